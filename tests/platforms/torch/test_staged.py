"""Steps that are fed ahead and replayed give what steps give that run op by op."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dovetail.core.engine.core import EngineCore
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch import records, staged
from dovetail.platforms.torch.records import is_served, recorded_shapes, recorded_sizes
from dovetail.platforms.torch.staged import StagedSteps
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engines import GREEDY, answer, make_core
from tests.platforms.torch.recordable import PlainAttention, make_staged

SMALL: dict[str, Any] = {"max_num_seqs": 12, "max_num_batched_tokens": 64, "max_model_len": 160}
SIMPLE = SamplingParams(temperature=0.0, max_tokens=20)
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, 250) for _ in range(RNG.randrange(1, 60))] for _ in range(14)]
PLAIN = [name for name in FAMILIES if name != "gemma2"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def tokens(core: EngineCore, params: Any = GREEDY, **more: Any) -> list[list[int]]:
    return [each.token_ids for each in answer(core, PROMPTS, params, **more)]


def test_sizes_end_at_the_most_rows_and_waste_little() -> None:
    for most in (1, 3, 8, 9, 100, 256, 1000):
        sizes = recorded_sizes(most)
        assert sizes[-1] == most and list(sizes) == sorted(set(sizes))
        for count in range(9, most + 1):
            assert min(size for size in sizes if size >= count) <= 1.8 * count


@pytest.mark.parametrize("family", PLAIN)
def test_tokens_are_those_of_the_reference(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path)
    got = tokens(make_staged(model, **SMALL), SIMPLE)
    assert got == tokens(make_core(model, "reference", **SMALL), SIMPLE)


def test_shapes_of_other_steps_have_more_tokens_than_rows() -> None:
    for tokens, rows in ((1, 1), (2, 1), (64, 12), (8192, 256), (1024, 1000), (700, 7)):
        shapes = recorded_shapes(tokens, rows)
        assert list(shapes) == sorted(set(shapes))
        assert all(count < size <= tokens and count <= rows for size, count in shapes)
        sizes = recorded_sizes(rows)
        assert all(count in sizes for _, count in shapes), "the choice is recorded by rows"
    assert recorded_shapes(1, 1) == ()
    assert recorded_shapes(700, 7)[-1] == (700, 7)
    assert recorded_shapes(5000, 256)[-3:] == ((3072, 256), (4096, 256), (5000, 256))
    assert recorded_shapes(1 << 17, 256)[-1] == (16384, 256)


def test_padding_is_free_where_the_host_takes_longer() -> None:
    assert is_served(513, 1024, even=0) and is_served(2000, 4096, even=5000)
    assert not is_served(2000, 4096, even=3000)
    assert is_served(3840, 4096, even=0) and not is_served(3839, 4096, even=0)


def watched(core: EngineCore) -> tuple[list[tuple[int, int]], list[int]]:
    """Takes down what is replayed from now on: tokens and rows of steps, rows of choices."""
    steps: Any = core.runner._steps  # type: ignore[attr-defined]
    assert isinstance(steps, StagedSteps)
    forwards: list[tuple[int, int]] = []
    choices: list[int] = []

    def noted(log: list[Any], key: Any, replay: Any) -> Any:
        return lambda: (log.append(key), replay())

    steps._forwards = {k: noted(forwards, k, v) for k, v in steps._forwards.items()}
    steps._choices = {
        rows: {kind: noted(choices, rows, replay) for kind, replay in kinds.items()}
        for rows, kinds in steps._choices.items()
    }
    return forwards, choices


def test_steps_are_really_replayed(llama: Path) -> None:
    core = make_staged(llama, **SMALL)
    said = core.runner.describe()["recorded"]
    assert "up to 12 rows" in said and "others of up to 64 tokens" in said
    forwards, choices = watched(core)
    tokens(core, SIMPLE)
    decoded = {shape for shape in forwards if shape[0] == shape[1]}
    assert len(forwards) > 20 and len(decoded) > 1
    assert len(set(forwards) - decoded) > 1
    assert choices == [rows for _, rows in forwards]


def test_steps_longer_than_any_record_choose_by_one(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_FEW_TOKENS", (16, 32))
    monkeypatch.setattr(records, "_MANY_TOKENS", (32,))
    core = make_staged(llama, **SMALL)
    forwards, choices = watched(core)
    got = tokens(core, SIMPLE)
    assert got == tokens(make_core(llama, "reference", **SMALL), SIMPLE)
    assert len(choices) > len(forwards) > 0


@pytest.mark.parametrize("even", [16, 48])
def test_steps_are_padded_to_large_records_where_that_pays(
    even: int, llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "_FEW_TOKENS", (16,))
    monkeypatch.setattr(records, "_MANY_TOKENS", (32, 48, 64))
    for module in (records, staged):
        monkeypatch.setattr(module, "ALWAYS", 16)
    monkeypatch.setattr(StagedSteps, "_compare", lambda steps: setattr(steps, "_even", even))
    core = make_staged(llama, **SMALL)
    assert "others of up to 64 tokens" in core.runner.describe()["recorded"]
    forwards, choices = watched(core)
    got = tokens(core, SIMPLE)
    assert got == tokens(make_core(llama, "reference", **SMALL), SIMPLE)
    sizes = {tokens for tokens, rows in forwards if tokens != rows}
    assert 64 in sizes and max(sizes - {64}) == even
    assert (len(choices) > len(forwards)) == (even == 16)


def test_a_backend_may_record_decode_steps_only(
    llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PlainAttention, "records_mixed", False)
    core = make_staged(llama, **SMALL)
    assert "attention backend plain cannot record them" in core.runner.describe()["recorded"]
    forwards, choices = watched(core)
    got = tokens(core, SIMPLE)
    assert got == tokens(make_core(llama, "reference", **SMALL), SIMPLE)
    assert forwards and all(tokens == rows for tokens, rows in forwards)
    assert len(choices) > len(forwards)


MIXED = [
    SamplingParams(temperature=t, max_tokens=n, **more)
    for t, n, more in (
        (0.0, 9, {}),
        (0.9, 20, {}),
        (0.7, 14, {"top_p": 0.9}),
        (1.2, 11, {"top_k": 4, "min_p": 0.02}),
        (0.0, 12, {"logprobs": 3}),
        (0.8, 12, {"repetition_penalty": 1.4, "logit_bias": {9: 2.0}}),
        (0.0, 8, {"prompt_logprobs": 2}),
    )
]
PATHS: dict[str, dict[str, Any]] = {
    "as it comes": {},
    "no step ahead": {"async_scheduling": False},
    "preemption": {"num_gpu_blocks_override": 9},
    "drafts": {
        "speculative_config": {"method": "suffix", "num_speculative_tokens": 3, "adaptive": False}
    },
}


@pytest.mark.parametrize("path", PATHS)
def test_every_kind_of_request_at_once(path: str, llama: Path) -> None:
    params = [MIXED[i % len(MIXED)] for i in range(len(PROMPTS))]
    core = make_staged(llama, **SMALL, **PATHS[path])
    seeds = list(range(len(PROMPTS)))
    cold = answer(core, PROMPTS, params, seeds=seeds)
    warm = answer(core, PROMPTS, params, seeds=seeds, first_id=100)
    want = answer(make_core(llama, "cpu", **SMALL), PROMPTS, params, seeds=seeds)
    for a, b, c in zip(cold, warm, want, strict=True):
        assert a.token_ids == b.token_ids == c.token_ids
        assert a.logprobs == pytest.approx(c.logprobs, abs=1e-4)
    if path == "preemption":
        assert core.scheduler.stats.num_preemptions > 0


def test_a_draft_model_guesses_beside_it(llama: Path) -> None:
    config = {"model": str(llama), "num_speculative_tokens": 3, "adaptive": False}
    core = make_staged(llama, **SMALL, speculative_config=config)
    assert tokens(core) == tokens(make_core(llama, "reference", **SMALL))
    assert core.stats().num_accepted_tokens > 0
