"""Level 2: every attention backend of the platform against dense attention in numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from dovetail.core.buckets import Buckets
from dovetail.core.conformance.base import Check, expect, expect_equal, require
from dovetail.core.conformance.contract_checks import KV_DTYPES
from dovetail.core.conformance.numpy_ops import NUMPY_DTYPES
from dovetail.core.conformance.op_checks import expect_near
from dovetail.core.conformance.sequences import Piece, Sequences, Sides
from dovetail.core.conformance.subject import Subject
from dovetail.core.conformance.tolerances import ATTENTION, KV
from dovetail.core.contracts.attention import AttentionBackend, AttentionNeed, AttentionSpec
from dovetail.core.errors import UnsupportedError

__all__ = ["CASES", "Case", "checks"]

_HEAD_SIZES = (16, 20, 33, 64, 80, 96, 128)
_USUAL_SIZES = (16, 64, 128, 256)
_MOST_ROWS = 8


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of attention. What is None is the first that the backend does not refuse."""

    statement: str
    heads: int = 4
    kv_heads: int = 2
    head_size: int | None = None
    kv_dtype: str | None = None
    """None: that of the activations."""
    block: int = 0
    """Which of the platform's block sizes, from the one nearest to 16."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of the spec."""
    deterministic: bool = False


CASES: dict[str, Case] = {
    "grouped": Case(statement="Several query heads share a KV head."),
    "one_kv_head": Case(statement="All query heads share one KV head.", heads=7, kv_heads=1),
    "equal_heads": Case(statement="Each query head has a KV head.", heads=3, kv_heads=3),
    "window": Case(statement="A window limits how far back is seen.", settings={"window": 20}),
    "narrow_window": Case(
        statement="A window may be narrower than a block.", settings={"window": 3}
    ),
    "soft_cap": Case(statement="Scores are capped.", settings={"soft_cap": 2.0}),
    "window_soft_cap": Case(
        statement="Window and soft cap go together.", settings={"window": 25, "soft_cap": 5.0}
    ),
    "alibi": Case(
        statement="Slopes are added to the scores.",
        settings={"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
    ),
    **{
        f"head_{size}": Case(statement=f"Heads of {size} entries.", head_size=size)
        for size in _HEAD_SIZES
    },
    **{
        f"block_{number}": Case(statement=f"Block size number {number}.", block=number)
        for number in range(3)
    },
    **{
        f"kv_{dtype}": Case(statement=f"Keys and values are kept as {dtype}.", kv_dtype=dtype)
        for dtype in sorted(KV_DTYPES - {"auto"})
    },
}
"""By name."""


def checks(subject: Subject) -> Iterator[Check]:
    """For each backend and dtype: every case, and what else a cache has to do."""
    special: dict[str, tuple[Callable[..., None], str]] = {
        "copy_blocks": (_copy_blocks, "A copied block is the block, and not tied to it."),
        "cache_bytes": (_cache_bytes, "A cache takes the bytes that were promised."),
        "padding": (_padding, "What pads a step changes nothing."),
        "deterministic": (_deterministic, "In deterministic mode pieces do not change a bit."),
    }
    for backend in subject.platform.attention_backends():
        for dtype in NUMPY_DTYPES:
            for name, case in CASES.items():
                function = partial(check_case, name=backend.name, dtype=dtype, case=case)
                yield _check(f"{backend.name}.{name}.{dtype}", case.statement, function)
            for name, (special_check, statement) in special.items():
                function = partial(special_check, name=backend.name, dtype=dtype)
                yield _check(f"{backend.name}.{name}.{dtype}", statement, function)


def _check(name: str, statement: str, function: Callable[[Subject], None]) -> Check:
    return Check(name=f"attention.{name}", level=2, statement=statement, function=function)


def check_case(subject: Subject, name: str, dtype: str, case: Case) -> None:
    """Raise unless whole sequences, last tokens one by one, and mixed pieces are all right.

    Where sequences are cut has little to do with dtypes: one of them goes all three ways, the
    others come in mixed pieces only.
    """
    backend = _backend(subject, name)
    work = _work(subject, backend, dtype, case)
    want = work.want()
    tolerance = ATTENTION[dtype] + KV[work.need.kv_dtype]
    able = subject.capabilities.dtypes
    main = "float32" if "float32" in able else able[0]
    paths = (work.whole, work.one_by_one, work.mixed) if dtype == main else (work.mixed,)
    for path in paths:
        got = work.run(backend, subject.workbench, path())
        for ours, theirs in zip(got, want, strict=True):
            where = f"{path.__name__}, a sequence of {len(theirs)}"
            expect_near(where, ours, theirs, tolerance)


def _backend(subject: Subject, name: str) -> AttentionBackend:
    backends = subject.once("attention", subject.platform.attention_backends)
    return next(backend for backend in backends if backend.name == name)


def _work(subject: Subject, backend: AttentionBackend, dtype: str, case: Case) -> Sequences:
    """Sequences for a case. Raises UnsupportedError with the backend's reason if it refuses."""
    subject.needs_dtype(dtype)
    able = subject.capabilities
    kv_dtype = case.kv_dtype or dtype
    same = {*able.kv_dtypes, *(able.dtypes if "auto" in able.kv_dtypes else ())}
    require(kv_dtype in same, f"the platform keeps {', '.join(able.kv_dtypes)}")
    sizes = sorted(able.block_sizes[:3], key=lambda size: abs(size - 16))
    require(case.block < len(sizes), f"the platform has {len(sizes)} block sizes")
    need = _first_served(backend, dtype, kv_dtype, sizes[case.block], case)
    block = need.block_size
    work = Sequences(
        need.specs[0],
        need,
        (1, 5, block, block + 1, 2 * block + 13),
        mixed_batches=able.mixed_batches,
    )
    if able.static_shapes:
        work.buckets = _buckets(work, _MOST_ROWS, 1)
    return work


def _first_served(
    backend: AttentionBackend, dtype: str, kv_dtype: str, block_size: int, case: Case
) -> AttentionNeed:
    """The case's need, with the smallest of the usual head sizes that is served."""
    refusal = ""
    for size in _USUAL_SIZES if case.head_size is None else (case.head_size,):
        spec = AttentionSpec(
            layer=0,
            num_heads=case.heads,
            num_kv_heads=case.kv_heads,
            head_size=size,
            scale=size**-0.5,
            **case.settings,
        )
        need = AttentionNeed(
            specs=(spec,),
            dtype=dtype,
            kv_dtype=kv_dtype,
            block_size=block_size,
            deterministic=case.deterministic,
        )
        reason = backend.refuses(need)
        if reason is None:
            return need
        refusal = refusal or reason
    raise UnsupportedError(refusal)


def _buckets(work: Sequences, rows: int, wider: int) -> Buckets:
    """One size of decode step, one of other steps, one width of tables."""
    width = work.tables.shape[1] * wider
    tokens = max(sum(work.lengths), rows + 1)
    return Buckets(decode=(rows,), tokens=(tokens,), blocks=(width,))


def _copy_blocks(subject: Subject, name: str, dtype: str) -> None:
    backend, bench = _backend(subject, name), subject.workbench
    work = _work(subject, backend, dtype, CASES["grouped"])
    block, last = work.need.block_size, work.lengths[-1] - 1
    number, spare = len(work.lengths) - 1, 0
    cache = backend.allocate(work.spec, work.need, work.num_blocks)
    for start in range(0, last, block):
        piece = Piece(number, start, min(block, last - start))
        _, cache = work.attend(backend, bench, cache, [piece], work.sides)
    pairs = np.stack([work.tables[number], work.tables[spare]], 1).astype(np.int32)
    (cache,) = backend.copy_blocks([cache], pairs)
    others = Sides(*([np.full_like(side[number], 3.0)] * len(side) for side in work.sides))
    for start in range(0, last, block):
        piece = Piece(number, start, min(block, last - start))
        _, cache = work.attend(backend, bench, cache, [piece], others)
    moved = work.tables.copy()
    moved[number] = work.tables[spare]
    got, _ = work.attend(backend, bench, cache, [Piece(number, last, 1)], work.sides, moved)
    want = work.want()[number][last:]
    tolerance = ATTENTION[dtype] + KV[work.need.kv_dtype]
    expect_near("a token behind copied blocks", got, want, tolerance)


def _cache_bytes(subject: Subject, name: str, dtype: str) -> None:
    backend, bench = _backend(subject, name), subject.workbench
    served = 0
    for kv_dtype in (None, *sorted(KV_DTYPES - {"auto"})):
        case = Case(statement="", kv_dtype=kv_dtype)
        try:
            work = _work(subject, backend, dtype, case)
        except UnsupportedError:
            if kv_dtype is None:
                raise
            continue
        served += 1
        for num_blocks in (1, 7):
            cache = backend.allocate(work.spec, work.need, num_blocks)
            promised = num_blocks * backend.bytes_per_block(work.spec, work.need)
            what = f"bytes of {num_blocks} blocks of {work.need.kv_dtype}"
            expect_equal(what, bench.num_bytes(cache), promised)
    expect(served > 0, "no KV dtype is served")


def _padding(subject: Subject, name: str, dtype: str) -> None:
    require(subject.capabilities.static_shapes, "steps are not padded: shapes are not static")
    backend = _backend(subject, name)
    work = _work(subject, backend, dtype, CASES["grouped"])
    tolerance = ATTENTION[dtype] + KV[work.need.kv_dtype]
    want = work.want()
    for rows, wider in ((len(work.lengths), 1), (2 * _MOST_ROWS, 3)):
        work = replace(work, buckets=_buckets(work, rows, wider))
        for path in (work.whole, work.one_by_one):
            got = work.run(backend, subject.workbench, path())
            for ours, theirs in zip(got, want, strict=True):
                expect_near(f"padded to {rows} rows, {path.__name__}", ours, theirs, tolerance)


def _deterministic(subject: Subject, name: str, dtype: str) -> None:
    subject.needs("deterministic")
    backend, bench = _backend(subject, name), subject.workbench
    work = _work(subject, backend, dtype, Case(statement="", deterministic=True))
    alone = [[Piece(i, 0, n)] for i, n in enumerate(work.lengths)]
    want = work.run(backend, bench, alone)
    for path in (work.whole, work.one_by_one, work.mixed):
        got = work.run(backend, bench, path())
        for ours, theirs in zip(got, want, strict=True):
            same = ours.tobytes() == theirs.tobytes()
            expect(same, f"{path.__name__}: a sequence of {len(theirs)} has other bits than alone")
