"""Level 2: every op of the table against numpy, over a few shapes and all dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from zlib import crc32

import numpy as np

from dovetail.core.conformance.base import Check, expect, expect_equal
from dovetail.core.conformance.numpy_ops import (
    NUMPY_DTYPES,
    DenseWeight,
    NumpyArray,
    references,
)
from dovetail.core.conformance.subject import Subject
from dovetail.core.conformance.tolerances import GATED_LINEAR, OP, op_tolerance
from dovetail.core.contracts.ops import INT4_GROUP
from dovetail.core.contracts.workbench import Workbench

__all__ = ["BINDERS", "checks", "expect_near"]

BINDERS = {"int8_linear": "int8_weight", "int4_linear": "int4_weight"}
"""Ops whose weights are bound by other ops, from all their arguments but the first."""
SHAPES = ((1, 64), (2, 33), (7, 130), (64, 8), (333, 96))
"""Rows and width of each case."""
GATES = ("silu_and_mul", "gelu_tanh_and_mul")
Arguments = tuple[Any, ...]


def checks(subject: Subject) -> Iterator[Check]:
    """One for each op and dtype."""
    for name in OP:
        for dtype in NUMPY_DTYPES:
            yield Check(
                name=f"ops.{name}.{dtype}",
                level=2,
                statement=f"The op {name} is that of numpy in {dtype}.",
                function=partial(check_op, name=name, dtype=dtype),
            )
    for dtype in NUMPY_DTYPES:
        yield Check(
            name=f"ops.gated_linear.{dtype}",
            level=2,
            statement=f"The op gated_linear is linear and a gate in {dtype}.",
            function=partial(check_gated_linear, dtype=dtype),
        )


def check_op(subject: Subject, name: str, dtype: str) -> None:
    """Raise unless the op gives what numpy gives, keeps dtypes and changes no input."""
    subject.needs_dtype(dtype)
    bench = subject.workbench
    override = bench.overrides.get(name)
    stated = None if override is None else override.tolerance.get(dtype)
    tolerance = op_tolerance(name, dtype, stated)
    for rows, width in SHAPES:
        random = np.random.default_rng([crc32(name.encode()), rows, width])
        for arguments in _CASES.get(name, _one)(random, NUMPY_DTYPES[dtype], rows, width):
            where = f"{name} of {rows} x {width}"
            for got, want in _run(bench, name, arguments, where):
                expect_near(where, got, want, tolerance)


def check_gated_linear(subject: Subject, dtype: str) -> None:
    """Raise unless it gives what numpy's linear gives, gated by numpy."""
    subject.needs_dtype(dtype)
    bench, ours = subject.workbench, references()
    for rows, width in SHAPES:
        for half in (width, 48):
            random = np.random.default_rng([rows, width, half])
            weight = random.standard_normal((2 * half, width)) / width**0.5
            weight = weight.astype(NUMPY_DTYPES[dtype])
            x = _draw(random, weight.dtype, rows, width)
            for bias in (None, _draw(random, weight.dtype, 2 * half)):
                placed = (None if a is None else bench.put(a) for a in (weight, bias))
                bound, summed = bench.bind_linear(*placed), DenseWeight(weight, bias)
                for gate in GATES:
                    got = bench.get(bench.ops.gated_linear(bench.put(x), bound, gate))
                    want = ours[gate](ours["linear"](x, summed))
                    where = f"gated_linear of {rows} x {width} to {half} by {gate}"
                    expect_near(where, got, want, GATED_LINEAR[dtype])


def expect_near(where: str, got: NumpyArray, want: NumpyArray, tolerance: float) -> None:
    """Raise CheckFailedError unless shape, dtype and every value are right, NaN where it is due."""
    expect_equal(f"{where}: shape", got.shape, want.shape)
    expect_equal(f"{where}: dtype", got.dtype, want.dtype)
    ours, theirs = got.astype(np.float64), want.astype(np.float64)
    error = np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))
    error[np.isnan(ours) & np.isnan(theirs)] = 0
    worst = np.unravel_index(np.argmax(np.where(np.isnan(error), np.inf, error)), error.shape)
    expect(
        bool(error[worst] <= tolerance),
        f"{where}: {ours[worst]:.6g} instead of {theirs[worst]:.6g} at"
        f" {[int(i) for i in worst]}; off by {error[worst]:.2g}, allowed are {tolerance:.2g}",
    )


def _run(
    bench: Workbench, name: str, arguments: Arguments, where: str
) -> list[tuple[NumpyArray, NumpyArray]]:
    """What the platform gives and what numpy gives, for each result of the op."""
    placed = [bench.put(a) if isinstance(a, np.ndarray) else a for a in arguments]
    ours = references()
    kept = len(placed)
    if name == "linear":
        got = bench.ops.linear(placed[0], bench.bind_linear(*placed[1:]))
        want = ours["linear"](arguments[0], DenseWeight(*arguments[1:]))
        kept = 1
    elif name in BINDERS:
        got = getattr(bench.ops, name)(placed[0], getattr(bench.ops, BINDERS[name])(*placed[1:]))
        want = ours[name](arguments[0], ours[BINDERS[name]](*arguments[1:]))
    else:
        got, want = getattr(bench.ops, name)(*placed), ours[name](*arguments)
    for number in range(kept):
        before = arguments[number]
        if isinstance(before, np.ndarray):
            same = bench.get(placed[number]).tobytes() == before.tobytes()
            expect(same, f"{where}: the op has changed its argument {number}")
    results = got if isinstance(got, tuple) else (got,)
    wanted = want if isinstance(want, tuple) else (want,)
    expect_equal(f"{where}: number of results", len(results), len(wanted))
    return [(bench.get(g), w) for g, w in zip(results, wanted, strict=True)]


Random = np.random.Generator


def _draw(random: Random, dtype: np.dtype[Any], *shape: int) -> NumpyArray:
    return random.standard_normal(shape).astype(dtype)


def _one(random: Random, dtype: np.dtype[Any], rows: int, width: int) -> Iterator[Arguments]:
    yield (_draw(random, dtype, rows, width),)


def _gated(random: Random, dtype: np.dtype[Any], rows: int, width: int) -> Iterator[Arguments]:
    yield (_draw(random, dtype, rows, 2 * width),)


def _numbered(random: Random, dtype: np.dtype[Any], rows: int, width: int) -> Iterator[Arguments]:
    yield _draw(random, dtype, rows, width), 2.53


def _pair(random: Random, dtype: np.dtype[Any], rows: int, width: int) -> Iterator[Arguments]:
    yield _draw(random, dtype, rows, width), _draw(random, dtype, rows, width)


def _embedding(random: Random, dtype: np.dtype[Any], rows: int, width: int) -> Iterator[Arguments]:
    ids = random.integers(0, 50, rows).astype(np.int32)
    yield ids, _draw(random, dtype, 50, width)


def _linear(random: Random, dtype: np.dtype[Any], rows: int, width: int) -> Iterator[Arguments]:
    weight = (random.standard_normal((width + 5, width)) / width**0.5).astype(dtype)
    x, bias = _draw(random, dtype, rows, width), _draw(random, dtype, width + 5)
    yield x, weight, None
    yield x, weight, bias


def _int8_linear(
    random: Random, dtype: np.dtype[Any], rows: int, width: int
) -> Iterator[Arguments]:
    codes = random.integers(-127, 128, (width + 5, width)).astype(np.int8)
    scales = (random.uniform(0.5, 2.0, width + 5) / 64 / width**0.5).astype(np.float32)
    x = _draw(random, dtype, rows, width)
    yield x, codes, scales, None
    yield _uneven(x), codes, scales, _draw(random, dtype, width + 5)
    codes = np.array([[127], [-127]], np.int8).repeat(width, axis=1)
    yield _ends(x), codes, np.full(2, 1 / 127 / width, np.float32), None


def _int4_linear(
    random: Random, dtype: np.dtype[Any], rows: int, width: int
) -> Iterator[Arguments]:
    groups = -(-width // INT4_GROUP)
    shape = (width + 5, groups * INT4_GROUP)
    codes = random.integers(0, 256, (shape[0], shape[1] // 2)).astype(np.uint8)
    scales = (random.uniform(0.5, 2.0, (shape[0], groups)) / 4 / shape[1] ** 0.5).astype(np.float32)
    x = _draw(random, dtype, rows, shape[1])
    yield x, codes, scales, None
    yield _uneven(x), codes, scales, _draw(random, dtype, shape[0])
    codes = np.array([[0], [255], [15]], np.uint8).repeat(shape[1] // 2, axis=1)
    yield _ends(x), codes, np.full((3, groups), 1 / 8 / shape[1], np.float32), None


def _ends(x: NumpyArray) -> NumpyArray:
    """Entries of 1 and -1, whose codes are the largest; rows are of one sign or of both."""
    ends = np.sign(x)
    ends[::3], ends[1::3] = 1, -1
    return ends


def _uneven(x: NumpyArray) -> NumpyArray:
    """Rows of zeros, of small numbers, with NaN and with an infinity, if there are so many."""
    uneven = x.copy()
    uneven[:1] = 0
    uneven[1:2] = (uneven[1:2].astype(np.float32) / 1000).astype(x.dtype)
    uneven[2:3, 3] = np.nan
    uneven[3:4, 1] = -np.inf
    return uneven


def _rms_norm(random: Random, dtype: np.dtype[Any], rows: int, width: int) -> Iterator[Arguments]:
    x, weight = _draw(random, dtype, rows, width), _draw(random, dtype, width)
    yield x, weight, 1e-6
    yield x, _draw(random, np.dtype(np.float32), width), 1e-3
    yield _draw(random, dtype, rows, 3, width), weight, 1e-6


def _add_rms_norm(
    random: Random, dtype: np.dtype[Any], rows: int, width: int
) -> Iterator[Arguments]:
    x, residual = _draw(random, dtype, rows, width), _draw(random, dtype, rows, width)
    yield x, residual, _draw(random, dtype, width), 1e-6
    yield x, residual, _draw(random, np.dtype(np.float32), width), 1e-6


def _layer_norm(random: Random, dtype: np.dtype[Any], rows: int, width: int) -> Iterator[Arguments]:
    x, weight = _draw(random, dtype, rows, width), _draw(random, dtype, width)
    yield x, weight, _draw(random, dtype, width), 1e-5
    yield x, weight, None, 1e-5


def _rotary(random: Random, dtype: np.dtype[Any], rows: int, width: int) -> Iterator[Arguments]:
    half = width // 2
    angles = random.uniform(0, 6.3, (rows, half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    yield _draw(random, dtype, rows, 3, 2 * half), cos, sin
    yield _draw(random, dtype, rows, 1, 2 * half + 3), cos, sin


_CASES: dict[str, Callable[[Random, np.dtype[Any], int, int], Iterator[Arguments]]] = {
    "embedding": _embedding,
    "linear": _linear,
    "int8_linear": _int8_linear,
    "int4_linear": _int4_linear,
    "rms_norm": _rms_norm,
    "add_rms_norm": _add_rms_norm,
    "add": _pair,
    "scale": _numbered,
    "layer_norm": _layer_norm,
    "rotary": _rotary,
    "silu_and_mul": _gated,
    "gelu_tanh_and_mul": _gated,
    "soft_cap": _numbered,
}
