"""Recorded steps give the bits of steps that are not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cpu_kernels import NAMES, kernels_of, threads
from cpu_kernels.engines import BLOCK_SIZE, Machine, Row, make_cpu_core
from dovetail_cpu import platform
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.recorded import MOST_TOKENS, RecordedModel

from dovetail.core.engine.core import EngineCore
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.ops import references
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engines import answer

pytestmark = pytest.mark.skipif(not NAMES, reason="the kernels were not compiled")
RANDOM = np.random.default_rng(0)
Checkpoint = Callable[..., Path]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Made once for each family."""
    made: dict[str, Path] = {}

    def make(family: str, **overrides: Any) -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = make_checkpoint(family, folder, dtype="bfloat16", **overrides)
        return made[family]

    return make


def tokens(count: int) -> list[int]:
    return RANDOM.integers(4, 200, count).tolist()


def decoding(count: int) -> list[Row]:
    """Rows of one token, in blocks of their own, as if what is before them were zeros."""
    return [Row(tokens(1), int(RANDOM.integers(0, BLOCK_SIZE)), [1 + i]) for i in range(count)]


def machines(core: EngineCore) -> tuple[Machine, Machine]:
    """The model with and without recording, each with a cache."""
    runner: Any = core.runner
    recorded = runner._loaded.model
    assert isinstance(recorded, RecordedModel)
    return Machine(recorded, core), Machine(recorded._model, core)


def expect_same(both: tuple[Machine, Machine], rows: list[Row]) -> None:
    with_records, without = (machine.step(rows) for machine in both)
    assert torch.equal(with_records, without)


@pytest.fixture
def core(kernels: Kernels, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> EngineCore:
    return make_cpu_core(checkpoint("qwen3"), kernels, monkeypatch)


def test_what_a_step_was_given_stays_its_callers(core: EngineCore) -> None:
    machine, _ = machines(core)
    forward, given = machine.model.forward, []

    def noted(inputs: Any, caches: Any) -> Any:
        given.append((inputs, inputs.token_ids_T.clone(), inputs.positions_T.clone()))
        return forward(inputs, caches)

    machine.model.forward = noted
    for _ in range(3):
        machine.step(decoding(5))
    for inputs, token_ids, positions in given:
        assert torch.equal(inputs.token_ids_T, token_ids)
        assert torch.equal(inputs.positions_T, positions)


@pytest.mark.parametrize("num", [1, 2])
def test_bits_are_the_same_over_steps_of_every_size(num: int, core: EngineCore) -> None:
    both = machines(core)
    with threads(num):
        for _ in range(3):
            for count in (1, 2, 3, 7, 16, 33, 63, 64, 65, 1, 7):
                expect_same(both, decoding(count) if count < 60 else decoding(40))
                expect_same(both, [Row(tokens(count), 0, [1, 2, 3, 4, 5])])
                expect_same(both, [Row(tokens(count), 9, [5, 9, 6, 4, 8, 7]), *decoding(3)])
            expect_same(both, [Row(tokens(200), 0, list(range(10, 23)))])
            expect_same(both, [Row(tokens(1), 200, list(range(10, 23))), *decoding(1)])
    sizes = vars(both[0].model)["_records"]
    assert {1, 2, 3, 7, 16, 33, 63, 64} <= set(sizes)
    assert max(sizes) == MOST_TOKENS


def test_a_sequence_may_move_to_other_blocks(core: EngineCore) -> None:
    both = machines(core)
    prompt, others = tokens(40), decoding(1)
    for blocks in ([1, 2, 3], [9, 30, 4], [3, 1, 2]):
        expect_same(both, [Row(prompt, 0, blocks)])
        for position in range(40, 46):
            expect_same(both, [Row(tokens(1), position, blocks)])
            expect_same(both, [Row(tokens(1), position, blocks), *others])


def test_every_cache_is_its_own(core: EngineCore) -> None:
    recorded, plain = machines(core)
    second = Machine(recorded.model, core)
    rows = decoding(5)
    first = recorded.step(rows)
    shifted = [Row(row.token_ids, row.begin, [b + 20 for b in row.blocks]) for row in rows]
    assert torch.equal(second.step(shifted), first)
    before = [cache.entries.clone() for cache in second.caches]
    assert torch.equal(recorded.step(rows), plain.step(rows))
    for cache, entries in zip(second.caches, before, strict=True):
        assert torch.equal(cache.entries, entries)


def test_memory_of_records_is_used_again(core: EngineCore) -> None:
    recorded, plain = machines(core)
    model = recorded.model
    sizes = []
    for _ in range(6):
        model._records.clear()
        for count in (1, 5, 16):
            rows = decoding(count)
            assert torch.equal(recorded.step(rows), plain.step(rows))
        sizes.append({size: len(blocks) for size, blocks in model._room._free.items()})
    assert sizes[1] == sizes[-1]


def test_nothing_live_lies_in_what_a_record_writes_to(core: EngineCore) -> None:
    recorded, plain = machines(core)
    steps = {count: decoding(count) for count in (1, 4, 9)}
    for rows in steps.values():
        expect_same((recorded, plain), rows)
    records = recorded.model._records
    for count, rows in steps.items():
        others = [record.hidden for size, record in records.items() if size != count]
        kept = [other.clone() for other in others]
        with torch.inference_mode():
            records[count].hidden.fill_(float("nan"))
        expect_same((recorded, plain), rows)
        assert all(torch.equal(other, before) for other, before in zip(others, kept, strict=True))
        with torch.inference_mode():
            for other in others:
                other.fill_(7.0)
        expect_same((recorded, plain), rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_recorded(
    family: str, kernels: Kernels, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    both = machines(make_cpu_core(checkpoint(family), kernels, monkeypatch))
    for count in (3, 3, 1, 3, 16):
        expect_same(both, decoding(count))
    expect_same(both, [Row(tokens(40), 0, [1, 2, 3])])
    expect_same(both, [Row(tokens(1), 40, [1, 2, 3]), *decoding(2)])
    assert both[0].model._obstacle is None
    assert set(both[0].model._records) >= {1, 3, 16}


def test_other_ops_are_found_out(core: EngineCore) -> None:
    both = machines(core)
    both[0].model._records.clear()
    # Both machines run this, the first of them without records.
    both[0].model._model._ops.add_rms_norm = references()["add_rms_norm"]
    for count in (3, 3, 1, 3):
        expect_same(both, decoding(count))
    assert "aten" in both[0].model._obstacle
    assert not both[0].model._records


PROMPTS = [tokens(1 + 7 * i % 90) for i in range(40)]
PARAMS = [SamplingParams(temperature=0.0, max_tokens=3 + i % 30, logprobs=0) for i in range(40)]


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_whole_engine_says_the_same(
    family: str, kernels: Kernels, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"max_num_seqs": 16, "max_num_batched_tokens": 128}
    core = make_cpu_core(checkpoint(family), kernels, monkeypatch, **settings)
    with threads(2):
        got = answer(core, PROMPTS, PARAMS)
    runner: Any = core.runner
    assert vars(runner._loaded.model)["_records"]
    monkeypatch.setattr(platform, "RecordedModel", lambda model, kernels: model)
    plain = make_cpu_core(checkpoint(family), kernels, monkeypatch, **settings)
    with threads(2):
        want = answer(plain, PROMPTS, PARAMS)
    assert [each.token_ids for each in got] == [each.token_ids for each in want]
    assert [each.logprobs for each in got] == [each.logprobs for each in want]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_layers_are_recorded(
    scheme: str, kernels: Kernels, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = checkpoint("llama")
    core = make_cpu_core(path, kernels, monkeypatch, quantization=scheme)
    both = machines(core)
    for count in (1, 6, 1, 6):
        expect_same(both, decoding(count))
    assert set(both[0].model._records) >= {1, 6}


def test_ops_can_be_wrapped(core: EngineCore) -> None:
    calls: Counter[str] = Counter()

    def wrap(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **more: Any) -> Any:
            calls[name] += 1
            return function(*args, **more)

        return called

    both, rows = machines(core), decoding(4)
    expect_same(both, rows)
    runner: Any = core.runner
    with runner.wrap_ops(wrap):
        for _ in range(3):
            both[0].step(rows)
    assert calls["rotary_attention"] == 3 * len(both[0].caches)
    calls.clear()
    expect_same(both, rows)
    assert not calls


def test_kernels_are_those_of_the_set(kernels: Kernels) -> None:
    assert kernels.instruction_set in NAMES
    assert kernels is kernels_of(kernels.instruction_set)
