"""What every backend over pages and kernels of other packages must pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.core.batch import Batch
from dovetail.core.buckets import Buckets, StepShape, pad_to
from dovetail.core.conformance.sequences import Sequences as Padded
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec, RecordableAttention
from dovetail.core.errors import InvariantError
from dovetail.core.plugins.selection import load_platform
from dovetail.platforms.torch.queue import HostQueue
from dovetail.platforms.torch.transfers import Uploads
from tests.attention_backends.sequences import Piece, Sequences, make_need, make_spec

__all__ = ["CPU", "Layers", "PagedBackend"]

CPU = torch.device("cpu")
LENGTHS = (1, 5, 16, 17, 100, 140)
SPECS: dict[str, dict[str, Any]] = {
    "groups of two": {},
    "groups of seven": {"heads": 7, "kv_heads": 1},
    "as many KV heads": {"heads": 3, "kv_heads": 3},
    "window": {"window": 20},
    "window of one": {"window": 1},
    "soft cap": {"soft_cap": 2.0},
    "window and soft cap": {"window": 60, "soft_cap": 5.0},
}


def near(got: list[Tensor], want: list[Tensor], *, by: float = 2e-3) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=by)


class PagedBackend(ABC):
    """The tests. A subclass names a backend, whose package must be emulated meanwhile."""

    block_size = 16

    @abstractmethod
    def make(self) -> Any:
        """The backend, new."""

    def served(self, spec: AttentionSpec, **more: Any) -> AttentionNeed:
        """A need that it does not refuse."""
        fixed = {"dtype": "float16", "kv_dtype": "float16", "block_size": self.block_size}
        need = make_need(spec, **(fixed | more))
        assert self.make().refuses(need) is None
        return need

    def layers(self, lengths: tuple[int, ...]) -> Layers:
        return Layers(self, lengths)

    @pytest.mark.parametrize("path", ["whole", "one_by_one", "mixed"])
    @pytest.mark.parametrize("name", SPECS)
    def test_values_are_those_of_the_reference(self, name: str, path: str) -> None:
        spec = make_spec(size=64, **SPECS[name])
        work = Sequences(spec, self.served(spec), LENGTHS)
        want = work.run(ReferenceAttention(CPU), work.whole())
        near(work.run(self.make(), getattr(work, path)()), want)

    def test_bfloat16_and_long_rows(self) -> None:
        spec = make_spec(size=128)
        need = self.served(spec, dtype="bfloat16", kv_dtype="bfloat16")
        work = Sequences(spec, need, (700, 300, 513))
        want = work.run(ReferenceAttention(CPU), work.whole())
        near(work.run(self.make(), work.mixed()), want, by=2e-2)

    @pytest.mark.parametrize("rows", [5, 8])
    def test_padding_changes_nothing(self, rows: int) -> None:
        spec = make_spec(size=64)
        work = Padded(
            spec,
            self.served(spec),
            (1, 5, 16, 17, 45),
            buckets=Buckets(decode=(rows,), tokens=(96,), blocks=(4,)),
        )
        bench = load_platform("reference").workbench()
        for steps in (work.whole(), work.one_by_one(), work.mixed()):
            for got, want in zip(work.run(self.make(), bench, steps), work.want(), strict=True):
                assert np.allclose(got.astype(np.float32), want.astype(np.float32), atol=2e-3)

    def test_what_pads_is_finite(self) -> None:
        spec = make_spec(size=64)
        work = Sequences(spec, self.served(spec), (20, 9))
        mixed, single = work.batch([(0, 0, 20), (1, 0, 9)]), work.batch([(0, 19, 1)])
        shapes = (pad_to(mixed, StepShape(40, 5, 3)), pad_to(single, StepShape(3, 3, 2)))
        for batch in (*shapes, pad_to(single, StepShape(6, 3, 2))):
            made = self.make()
            cache = made.allocate(spec, work.need, work.num_blocks)
            sides = (torch.randn(batch.num_tokens, n, 64).half() for n in (4, 2, 2))
            out, _ = made.attend(*sides, cache, made.plan(batch, work.need), spec)
            assert out.shape == (batch.num_tokens, 4, 64) and out.isfinite().all()

    def test_layers_of_several_kinds_share_a_step(self) -> None:
        layers = self.layers((30, 7, 41))
        first = [(0, 0, 29), (1, 0, 7), (2, 0, 38)]
        second = [(0, 29, 1), (2, 38, 3)]
        for pieces in (first, second):
            size = sum(n for *_, n in pieces)
            layers.run(layers.backend.plan(layers.batch(pieces), layers.need), pieces, size)

    @pytest.mark.parametrize("rows", [4, 5])
    def test_a_plan_serves_other_steps_of_its_size(self, rows: int) -> None:
        """Recorded once over memory that is written anew, beside steps that are not recorded."""
        layers = self.layers((50, 1, 33, 20))
        assert isinstance(layers.backend, RecordableAttention)
        uploads = Uploads(HostQueue(), CPU, 4096)

        def padded(pieces: list[Piece]) -> tuple[Batch, Any]:
            batch = layers.batch(pieces)
            step = pad_to(batch, StepShape(rows, rows, batch.block_tables.shape[1]))
            arrays = layers.backend.host_plan(step, layers.need)
            assert all(array.dtype == np.int32 for array in arrays)
            uploads.send(arrays)
            return step, arrays

        rehearsal, arrays = padded([(1, 0, 1)])
        plan = layers.backend.device_plan(uploads.views(arrays), rehearsal, layers.need)
        prompts = [(0, 0, 40), (1, 0, 1), (2, 0, 31), (3, 0, 17)]
        layers.run(layers.backend.plan(layers.batch(prompts), layers.need), prompts, 89)
        for pieces in (
            [(0, 40, 1), (2, 31, 1), (3, 17, 1)],
            [(2, 32, 1)],
            [(0, 41, 1), (3, 18, 1)],
        ):
            padded(pieces)
            layers.run(plan, pieces, rows)
            later = [(0, pieces[0][1] + 1, 2)] if pieces[0][0] == 0 else [(3, 18, 1), (0, 41, 2)]
            size = sum(n for *_, n in later)
            layers.run(layers.backend.plan(layers.batch(later), layers.need), later, size)

    def test_a_plan_to_be_recorded_needs_the_longest_length(self) -> None:
        spec = make_spec(size=64)
        work = Sequences(spec, self.served(spec), (20, 9))
        made, batch = self.make(), work.batch([(0, 19, 1), (1, 8, 1)])
        arrays = [torch.from_numpy(array) for array in made.host_plan(batch, work.need)]
        with pytest.raises(InvariantError, match="max_len"):
            made.device_plan(arrays, batch, work.need)

    def test_copied_blocks_are_the_blocks(self) -> None:
        spec = make_spec(size=64)
        work = Sequences(spec, self.served(spec), (40, 40))
        made = self.make()
        cache = made.allocate(spec, work.need, work.num_blocks)
        expected = work.num_blocks * made.bytes_per_block(spec, work.need)
        assert cache.nbytes == expected
        cache.copy_(torch.randn(cache.shape))
        before = cache.clone()
        pairs = np.stack([work.tables[0], work.tables[1]], 1).astype(np.int32)
        (copied,) = made.copy_blocks([cache], pairs)
        source, target = (torch.from_numpy(side).long() for side in pairs.T)
        assert torch.equal(copied[:, target], before[:, source])
        assert torch.equal(copied[:, source], before[:, source])

    def test_plans_of_others_are_told(self) -> None:
        spec = make_spec(size=64)
        made, need = self.make(), self.served(spec)
        cache = made.allocate(spec, need, 2)
        q, k = torch.zeros(1, 4, 64).half(), torch.zeros(1, 2, 64).half()
        with pytest.raises(TypeError, match="another backend: str"):
            made.attend(q, k, k, cache, "plan", spec)

    def test_layers_attend_in_order(self) -> None:
        layers = self.layers((8, 4))
        pieces = [(0, 0, 8)]
        plan = layers.backend.plan(layers.batch(pieces), layers.need)
        sides = layers.sides(1, pieces, 8)
        with pytest.raises(InvariantError, match="layer 1 attends before layer 0"):
            layers.backend.attend(*sides, layers.caches[1], plan, layers.specs[1])


class Layers:
    """A few layers of several kinds over one set of sequences, each with a cache of its own."""

    def __init__(self, tests: PagedBackend, lengths: tuple[int, ...]) -> None:
        kinds = [{}, {"window": 20}, {}, {"window": 20, "soft_cap": 3.0}]
        self.specs = tuple(
            replace(make_spec(size=64, **kind), layer=i) for i, kind in enumerate(kinds)
        )
        need = tests.served(self.specs[0], max_len=2 * max(lengths))
        self.need = replace(need, specs=self.specs)
        self.backend = tests.make()
        self.works = [Sequences(spec, self.need, lengths) for spec in self.specs]
        self.caches = [
            self.backend.allocate(spec, self.need, self.works[0].num_blocks) for spec in self.specs
        ]
        self.want = [work.run(ReferenceAttention(CPU), work.whole()) for work in self.works]

    def sides(self, layer: int, pieces: list[Piece], size: int) -> list[Tensor]:
        work = self.works[layer]
        joined = [
            torch.cat([side[i][a : a + n] for i, a, n in pieces])
            for side in (work.q, work.k, work.v)
        ]
        return [torch.cat([x, x.new_ones(size - len(x), *x.shape[1:])]) for x in joined]

    def check(self, outs: list[Tensor], pieces: list[Piece]) -> None:
        for want, out in zip(self.want, outs, strict=True):
            near([out], [torch.cat([want[i][a : a + n] for i, a, n in pieces])])

    def run(self, plan: object, pieces: list[Piece], size: int) -> None:
        outs = []
        for i, spec in enumerate(self.specs):
            sides = self.sides(i, pieces, size)
            out, _ = self.backend.attend(*sides, self.caches[i], plan, spec)
            outs.append(out[: sum(n for *_, n in pieces)])
        self.check(outs, pieces)

    def batch(self, pieces: list[Piece]) -> Batch:
        return self.works[0].batch(pieces)
