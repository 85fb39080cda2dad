"""The oracle's ops against torch's, which were written apart from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dovetail.attention_backends.reference import attention_bias
from dovetail.core.conformance import numpy_ops
from dovetail.core.conformance.numpy_ops import NUMPY_DTYPES, dense_attention
from dovetail.core.conformance.op_checks import _CASES, BINDERS, SHAPES, _one, expect_near
from dovetail.core.conformance.tolerances import OP, op_tolerance
from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.ops import OP_NAMES
from dovetail.core.errors import UnsupportedError
from dovetail.platforms.torch.dtypes import from_numpy, to_numpy
from dovetail.platforms.torch.ops import DenseLinear, references


def test_every_op_is_there_and_has_a_tolerance() -> None:
    assert tuple(numpy_ops.references()) == OP_NAMES
    assert set(OP) == set(OP_NAMES) - {"attention", *BINDERS.values()}
    with pytest.raises(UnsupportedError):
        numpy_ops.references()["attention"](None, None, None, None, None, None)


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
@pytest.mark.parametrize("name", OP)
def test_ops_are_those_of_torch(name: str, dtype: str) -> None:
    tolerance = op_tolerance(name, dtype, None)
    for rows, width in SHAPES:
        random = np.random.default_rng(rows)
        for arguments in _CASES.get(name, _one)(random, NUMPY_DTYPES[dtype], rows, width):
            for got, want in zip(*both(name, arguments), strict=True):
                expect_near(name, want, got, tolerance)


def both(name: str, arguments: tuple[Any, ...]) -> tuple[list[Any], list[Any]]:
    placed = [from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments]
    if name == "linear":
        placed = [placed[0], DenseLinear(placed[1], placed[2])]
        arguments = (arguments[0], numpy_ops.DenseWeight(arguments[1], arguments[2]))
    if name in BINDERS:
        placed = [placed[0], references()[BINDERS[name]](*placed[1:])]
        weight = numpy_ops.references()[BINDERS[name]](*arguments[1:])
        arguments = (arguments[0], weight)
    got, want = numpy_ops.references()[name](*arguments), references()[name](*placed)
    if not isinstance(got, tuple):
        got, want = (got,), (want,)
    return list(got), [to_numpy(array) for array in want]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"window": 3},
        {"soft_cap": 0.7},
        {"alibi_slopes": (0.5, 0.25, 0.125, 1.0)},
        {"window": 5, "soft_cap": 2.0, "alibi_slopes": (0.5, 0.25, 0.125, 1.0)},
    ],
)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_attention_is_the_formula(kv_heads: int, settings: dict[str, Any]) -> None:
    spec = AttentionSpec(
        layer=0, num_heads=4, num_kv_heads=kv_heads, head_size=6, scale=0.4, **settings
    )
    random = np.random.default_rng(kv_heads)
    q = random.standard_normal((5, 4, 6)).astype(np.float32)
    k, v = (random.standard_normal((9, kv_heads, 6)).astype(np.float32) for _ in range(2))
    kept = [torch.from_numpy(x).double().repeat_interleave(4 // kv_heads, 1) for x in (k, v)]
    scores = torch.einsum("the,lhe->htl", torch.from_numpy(q).double(), kept[0]) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    scores = scores + attention_bias(spec, torch.arange(4, 9), torch.arange(9))
    want = torch.einsum("htl,lhe->the", scores.softmax(-1), kept[1]).numpy()
    got = dense_attention(q, k, v, spec)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < 1e-6


def test_attention_of_a_prefix_is_that_of_the_whole() -> None:
    spec = AttentionSpec(layer=0, num_heads=2, num_kv_heads=1, head_size=4, scale=0.5, window=4)
    random = np.random.default_rng(0)
    q = random.standard_normal((8, 2, 4)).astype(np.float32)
    k, v = (random.standard_normal((8, 1, 4)).astype(np.float32) for _ in range(2))
    whole = dense_attention(q, k, v, spec)
    for length in range(1, 9):
        part = dense_attention(q[length - 1 : length], k[:length], v[:length], spec)
        assert np.abs(part[0] - whole[length - 1]).max() < 1e-6
