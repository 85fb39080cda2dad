"""FlashAttention and FlashInfer, emulated, against the reference backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from dovetail_cuda.flash import FlashAttention2, FlashAttention3
from dovetail_cuda.flashinfer import FlashInferAttention, decode_rows
from dovetail_cuda.pages import must_not_record
from torch import Tensor

from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.core.batch import Batch
from dovetail.core.buckets import Buckets, StepShape, pad_to
from dovetail.core.conformance.sequences import Sequences as Padded
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec, RecordableAttention
from dovetail.core.errors import InvariantError
from dovetail.core.plugins.selection import load_platform
from dovetail.platforms.torch.queue import HostQueue
from dovetail.platforms.torch.staged import recorded_sizes
from dovetail.platforms.torch.transfers import Uploads
from tests.attention_backends.sequences import Piece, Sequences, make_need, make_spec

pytestmark = pytest.mark.usefixtures("emulated")

CPU = torch.device("cpu")
HOPPER = (9, 0)
BACKENDS: list[Any] = [FlashInferAttention, FlashAttention3, FlashAttention2]
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


def served(backend: Any, spec: AttentionSpec, **more: Any) -> AttentionNeed:
    block_size = 256 if backend is FlashAttention2 else 16
    fixed = {"dtype": "float16", "kv_dtype": "float16", "block_size": block_size}
    need = make_need(spec, **(fixed | more))
    assert make(backend).refuses(need) is None
    return need


def make(backend: Any) -> Any:
    return backend(CPU, HOPPER)


def near(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("path", ["whole", "one_by_one", "mixed"])
@pytest.mark.parametrize("name", SPECS)
def test_values_are_those_of_the_reference(name: str, path: str, backend: Any) -> None:
    spec = make_spec(size=64, **SPECS[name])
    work = Sequences(spec, served(backend, spec), LENGTHS)
    want = work.run(ReferenceAttention(CPU), work.whole())
    near(work.run(make(backend), getattr(work, path)()), want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_and_long_rows(backend: Any) -> None:
    spec = make_spec(size=128)
    need = served(backend, spec, dtype="bfloat16", kv_dtype="bfloat16")
    work = Sequences(spec, need, (700, 300, 513))
    want = work.run(ReferenceAttention(CPU), work.whole())
    for a, b in zip(work.run(make(backend), work.mixed()), want, strict=True):
        assert torch.allclose(a.float(), b.float(), atol=2e-2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [5, 8])
def test_padding_changes_nothing(backend: Any, rows: int) -> None:
    spec = make_spec(size=64)
    work = Padded(
        spec,
        served(backend, spec),
        (1, 5, 16, 17, 45),
        buckets=Buckets(decode=(rows,), tokens=(96,), blocks=(4,)),
    )
    bench = load_platform("reference").workbench()
    for steps in (work.whole(), work.one_by_one(), work.mixed()):
        for got, want in zip(work.run(make(backend), bench, steps), work.want(), strict=True):
            assert np.allclose(got.astype(np.float32), want.astype(np.float32), atol=2e-3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_pads_is_finite(backend: Any) -> None:
    spec = make_spec(size=64)
    work = Sequences(spec, served(backend, spec), (20, 9))
    mixed, single = work.batch([(0, 0, 20), (1, 0, 9)]), work.batch([(0, 19, 1)])
    shapes = (pad_to(mixed, StepShape(40, 5, 3)), pad_to(single, StepShape(3, 3, 2)))
    for batch in (*shapes, pad_to(single, StepShape(6, 3, 2))):
        made = make(backend)
        cache = made.allocate(spec, work.need, work.num_blocks)
        sides = (torch.randn(batch.num_tokens, n, 64).half() for n in (4, 2, 2))
        out, _ = made.attend(*sides, cache, made.plan(batch, work.need), spec)
        assert out.shape == (batch.num_tokens, 4, 64) and out.isfinite().all()


class Layers:
    """A few layers of several kinds over one set of sequences, each with a cache of its own."""

    def __init__(self, backend: Any, lengths: tuple[int, ...], **more: Any) -> None:
        kinds = [{}, {"window": 20}, {}, {"window": 20, "soft_cap": 3.0}]
        self.specs = tuple(
            replace(make_spec(size=64, **kind), layer=i) for i, kind in enumerate(kinds)
        )
        need = served(backend, self.specs[0], max_len=2 * max(lengths), **more)
        self.need = replace(need, specs=self.specs)
        self.backend = make(backend)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_layers_of_several_kinds_share_a_step(backend: Any) -> None:
    layers = Layers(backend, (30, 7, 41))
    first = [(0, 0, 29), (1, 0, 7), (2, 0, 38)]
    second = [(0, 29, 1), (2, 38, 3)]
    for pieces in (first, second):
        size = sum(n for *_, n in pieces)
        layers.run(layers.backend.plan(layers.batch(pieces), layers.need), pieces, size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [4, 5])
def test_a_plan_serves_other_steps_of_its_size(backend: Any, rows: int) -> None:
    """Recorded once over memory that is written anew, beside steps that are not recorded."""
    layers = Layers(backend, (50, 1, 33, 20))
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
    for pieces in ([(0, 40, 1), (2, 31, 1), (3, 17, 1)], [(2, 32, 1)], [(0, 41, 1), (3, 18, 1)]):
        padded(pieces)
        layers.run(plan, pieces, rows)
        later = [(0, pieces[0][1] + 1, 2)] if pieces[0][0] == 0 else [(3, 18, 1), (0, 41, 2)]
        size = sum(n for *_, n in later)
        layers.run(layers.backend.plan(layers.batch(later), layers.need), later, size)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_plan_to_be_recorded_needs_the_longest_length(backend: Any) -> None:
    spec = make_spec(size=64)
    work = Sequences(spec, served(backend, spec), (20, 9))
    made, batch = make(backend), work.batch([(0, 19, 1), (1, 8, 1)])
    arrays = [torch.from_numpy(array) for array in made.host_plan(batch, work.need)]
    with pytest.raises(InvariantError, match="max_len"):
        made.device_plan(arrays, batch, work.need)


@pytest.mark.parametrize("backend", BACKENDS)
def test_copied_blocks_are_the_blocks(backend: Any) -> None:
    spec = make_spec(size=64)
    work = Sequences(spec, served(backend, spec), (40, 40))
    made = make(backend)
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


@pytest.mark.parametrize("backend", BACKENDS)
def test_plans_of_others_are_told(backend: Any) -> None:
    spec = make_spec(size=64)
    made, need = make(backend), served(backend, spec)
    cache = made.allocate(spec, need, 2)
    q, k = torch.zeros(1, 4, 64).half(), torch.zeros(1, 2, 64).half()
    with pytest.raises(TypeError, match="another backend: str"):
        made.attend(q, k, k, cache, "plan", spec)


def test_a_prefill_that_was_planned_over_is_told() -> None:
    spec = make_spec(size=64)
    work = Sequences(spec, served(FlashInferAttention, spec), (20, 9))
    made = make(FlashInferAttention)
    cache = made.allocate(spec, work.need, work.num_blocks)
    old = made.plan(work.batch([(0, 0, 20)]), work.need)
    made.plan(work.batch([(1, 0, 9)]), work.need)
    sides = (side[0] for side in (work.q, work.k, work.v))
    with pytest.raises(InvariantError, match="another step"):
        made.attend(*sides, cache, old, spec)


def test_layers_attend_in_order() -> None:
    layers = Layers(FlashAttention3, (8, 4))
    pieces = [(0, 0, 8)]
    plan = layers.backend.plan(layers.batch(pieces), layers.need)
    sides = layers.sides(1, pieces, 8)
    with pytest.raises(InvariantError, match="layer 1 attends before layer 0"):
        layers.backend.attend(*sides, layers.caches[1], plan, layers.specs[1])


def test_wrappers_are_as_few_as_sizes_and_kinds() -> None:
    from emulated_cuda.infer import Wrapper

    layers = Layers(FlashInferAttention, (9,) * 40)
    Wrapper.made.clear()
    for count in range(40, 0, -1):
        pieces = [(i, 3, 1) for i in range(count)]
        layers.backend.plan(layers.batch(pieces), layers.need)
    sizes = {decode_rows(count) for count in range(1, 41)}
    assert sizes == {1, 2, 4, 8, 16, 24, 32, 40}
    assert len(Wrapper.made) == 3 * len(sizes)  # three kinds of layers
    assert sum(wrapper.num_plans for wrapper in Wrapper.made) == 3 * 40


def test_recorded_sizes_are_padded_no_further() -> None:
    for most in (1, 4, 8, 64, 256, 320):
        assert {decode_rows(size) for size in recorded_sizes(most)} == set(recorded_sizes(most))
    for count in range(1, 2000):
        assert count <= decode_rows(count) <= max(8, 1.8 * count)


def test_what_may_not_be_recorded_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    for captures in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda on=captures: on)
        if captures:
            with pytest.raises(InvariantError, match="cannot be recorded: some row"):
                must_not_record(device, "some row has more than one token")
        else:
            must_not_record(device, "some row has more than one token")
