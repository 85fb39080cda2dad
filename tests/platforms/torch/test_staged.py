"""Steps that are fed ahead and replayed give what steps give that run op by op."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from dovetail.core.engine.core import EngineCore
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.staged import StagedSteps, recorded_sizes
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engines import GREEDY, answer, make_core
from tests.platforms.torch.recordable import make_staged

SMALL: dict[str, Any] = {"max_num_seqs": 12, "max_num_batched_tokens": 64, "max_model_len": 160}
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
    simple = SamplingParams(temperature=0.0, max_tokens=20)
    got = tokens(make_staged(model, **SMALL), simple)
    assert got == tokens(make_core(model, "reference", **SMALL), simple)


def test_steps_are_really_replayed(llama: Path) -> None:
    core = make_staged(llama, **SMALL)
    steps: Any = core.runner._steps  # type: ignore[attr-defined]
    assert isinstance(steps, StagedSteps)
    assert "up to 12 rows" in core.runner.describe()["recorded"]
    replayed = []
    for size, record in list(steps._records.items()):
        forward = record.forward
        steps._records[size] = record._replace(
            forward=lambda size=size, forward=forward: (replayed.append(size), forward())
        )
    tokens(core, SamplingParams(temperature=0.0, max_tokens=20))
    assert len(replayed) > 20 and len(set(replayed)) > 1


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
