"""Plans: padded, replayed, and what is read of the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dovetail.attention_backends.triton.backend import TritonAttention
from dovetail.attention_backends.triton.cache import Cache
from dovetail.attention_backends.triton.launch import Launch, run
from dovetail.core.batch import Batch
from dovetail.core.buckets import StepShape, pad_to
from tests.attention_backends.sequences import Piece, Sequences
from tests.attention_backends.triton.work import (
    TOLERANCE,
    check_near,
    last_tokens,
    make_work,
    moved,
    ran,
    wanted,
)

VOID = 1e4


class Steps:
    """One backend and one cache; steps are padded, and perhaps replayed."""

    def __init__(self, work: Sequences, device: torch.device, shapes: Any) -> None:
        self.work, self.device, self.shapes = moved(work, device), device, shapes
        self.seen: list[Launch] = []
        self.backend = TritonAttention(device, launch=self._run)
        self.cache = self.backend.allocate(work.spec, work.need, work.num_blocks)
        self.out = [torch.full_like(q, float("nan")) for q in work.q]

    def _run(self, launch: Launch) -> None:
        self.seen.append(launch)
        run(launch)

    def sides(self, pieces: list[Piece], size: int) -> list[Tensor]:
        found = []
        for side in (self.work.q, self.work.k, self.work.v):
            part = torch.cat([side[i][a : a + n] for i, a, n in pieces])
            void = torch.full((size - len(part), *part.shape[1:]), VOID, dtype=part.dtype)
            found.append(torch.cat([part, void.to(self.device)]))
        return found

    def padded(self, pieces: list[Piece]) -> Batch:
        batch = self.work.batch(pieces)
        return pad_to(batch, self.shapes(batch))

    def step(self, pieces: list[Piece], plan: Any = None) -> Tensor:
        batch = self.padded(pieces)
        plan = self.backend.plan(batch, self.work.need) if plan is None else plan
        sides = self.sides(pieces, batch.num_tokens)
        got, self.cache = self.backend.attend(*sides, self.cache, plan, self.work.spec)
        return got.cpu()

    def keep(self, pieces: list[Piece], got: Tensor) -> None:
        first = 0
        for i, start, count in pieces:
            self.out[i][start : start + count] = got[first : first + count]
            first += count


def roomy(batch: Batch) -> StepShape:
    """Rows and tokens of no request, in steps that decode and in others."""
    width = batch.block_tables.shape[1] + 2
    if batch.num_tokens == batch.num_rows:
        return StepShape(batch.num_rows + 3, batch.num_rows + 3, width)
    return StepShape(batch.num_tokens + 40, batch.num_rows + 2, width)


@pytest.mark.parametrize(("path", "window"), [("last_tokens", None), ("mixed", 6)])
def test_padding_changes_nothing(path: str, window: int | None, device: torch.device) -> None:
    work = make_work((1, 9, 34), window=window)
    plain = ran(work, device, last_tokens(work) if path == "last_tokens" else work.mixed())
    steps = Steps(work, device, roomy)
    for pieces in last_tokens(work) if path == "last_tokens" else work.mixed():
        got = steps.step(pieces)
        assert torch.isfinite(got).all(), "tokens of no row must stay finite"
        steps.keep(pieces, got)
    check_near(steps.out, wanted(work), TOLERANCE["float32"])
    check_near(steps.out, plain, 1e-6)


REPLAYED = ([(0, 2, 1), (1, 7, 1)], [(1, 17, 1), (0, 33, 1)], [(1, 30, 1)])
"""Steps of one padded shape; sequences grow between those that are written here."""


def test_a_recorded_step_serves_others_of_its_size(device: torch.device) -> None:
    """As a graph is replayed: the plan of the first step over other arrays, copied into its own."""
    work = make_work((34, 34))
    steps = Steps(work, device, lambda batch: StepShape(4, 4, 4))
    fill = Steps(work, device, lambda batch: StepShape(80, 2, 4))
    held: list[Tensor] = []
    recorded, plan = [], None
    for pieces in REPLAYED:
        fill.cache = steps.cache
        fill.step([(i, 0, a) for i, a, _ in pieces])
        batch = steps.padded(pieces)
        arrays = steps.backend.host_plan(batch, work.need)
        if plan is None:
            sizes = [array.size for array in arrays[:-1]]
            held = [torch.zeros(size, dtype=torch.int32, device=device) for size in (*sizes, 12)]
            plan = steps.backend.device_plan(held, batch, work.need)
        assert [array.size for array in arrays[:-1]] == sizes
        for target, array in zip(held, arrays, strict=True):
            target[: array.size] = torch.from_numpy(array).to(device)
        fresh = steps.step(pieces)
        steps.seen.clear()
        assert torch.equal(steps.step(pieces, plan), fresh)
        recorded.append([(launch.kernel, launch.grid, launch.options) for launch in steps.seen])
        steps.keep(pieces, fresh)
    assert all(launches == recorded[0] for launches in recorded)
    for out, want in zip(steps.out, wanted(work), strict=True):
        done = torch.isfinite(out).all(-1).all(-1)
        check_near([out[done]], [want[done]], TOLERANCE["float32"])
        assert done.any()


def test_a_plan_leaves_out_what_the_step_does_not_need(device: torch.device) -> None:
    work = make_work((9, 34))
    steps = Steps(work, device, roomy)
    kernels = []
    for pieces in ([(0, 0, 9), (1, 0, 30)], [(0, 8, 1), (1, 30, 1)], [(0, 8, 1), (1, 31, 3)]):
        steps.seen.clear()
        batch = work.batch(pieces)
        plan = steps.backend.plan(batch, work.need)
        sides = steps.sides(pieces, batch.num_tokens)
        steps.backend.attend(*sides, steps.cache, plan, work.spec)
        kernels.append([launch.kernel for launch in steps.seen])
    assert kernels[0] == ["write", "prefill"]
    assert kernels[1] == ["write", "decode", "reduce"]
    assert kernels[2] == ["write", "decode", "reduce", "prefill"]


def poison(cache: Cache) -> None:
    for part in cache.parts():
        part.fill_(float("nan") if part.dtype.is_floating_point else 0x7F)


@pytest.mark.parametrize("settings", [{}, {"window": 7}, {"kv_dtype": "fp8_e4m3"}])
def test_what_nobody_wrote_may_be_anything(settings: dict[str, Any], device: torch.device) -> None:
    work = make_work((5, 34), **settings)
    steps = Steps(work, device, roomy)
    poison(steps.cache)
    for pieces in work.mixed():
        steps.keep(pieces, steps.step(pieces))
    check_near(steps.out, wanted(work), TOLERANCE["float32"])


def test_blocks_before_the_window_may_be_given_away(device: torch.device) -> None:
    work = make_work((50,), window=8)
    steps = Steps(work, device, roomy)
    for start, count in ((0, 40), (40, 1), (41, 9)):
        pieces = [(0, start, count)]
        steps.keep(pieces, steps.step(pieces))
        if start == 0:
            for part in steps.cache.parts():
                part[work.tables[0, :2].tolist()] = float("nan")
    check_near(steps.out, wanted(work), TOLERANCE["float32"])


@pytest.mark.parametrize("kv_dtype", ["float32", "int8"])
def test_a_sequence_that_is_not_finite_harms_no_other(kv_dtype: str, device: torch.device) -> None:
    work = make_work((20, 20), kv_dtype=kv_dtype)
    want = wanted(work)
    work.k[0][15] = float("nan")
    got = ran(work, device, work.whole())
    check_near([got[1]], [want[1]], TOLERANCE["float32"])
    assert torch.isnan(got[0][15:]).all()


def test_tables_are_as_tight_as_the_longest_row() -> None:
    work = make_work((5, 34))
    backend = TritonAttention(torch.device("cpu"))
    batch = work.batch([(0, 0, 5), (1, 0, 17)])
    wide = replace(batch, block_tables=np.pad(batch.block_tables, ((0, 0), (0, 30))))
    *_, meta, tables = backend.host_plan(wide, work.need)
    assert meta.tolist() == [2] and tables.size == 4
    assert all(array.dtype == np.int32 for array in backend.host_plan(wide, work.need))
