"""A model with a window in every layer says the same whether its old blocks are kept or not."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from dovetail.core.engine.core import EngineCore
from dovetail.core.request import SamplingParams
from dovetail.core.scheduler.scheduler import Scheduler
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core
from tests.thorough import diagonal

WINDOW, SIZE, STEP = 40, 16, 64
PARAMS = SamplingParams(temperature=0.0, max_tokens=60, logprobs=0)
LENGTHS = (5, 39, 41, 130, 200, 333)


FAMILIES, PLATFORMS = ("mistral", "phi3"), ("reference", "cpu")


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    return make_checkpoint(request.param, folder, sliding_window=WINDOW)


def keeping(core: EngineCore) -> EngineCore:
    """The same engine, not told of the window."""
    config = dataclasses.replace(core.scheduler.config, window=None)
    return EngineCore(Scheduler(config), core.runner, steps_ahead=core.steps_ahead)


def peaks(core: EngineCore) -> list[int]:
    """Filled in while the engine runs: the blocks that were in use in each step."""
    pool, step, seen = core.scheduler.pool, core.runner.step, []

    def watched(batch: object) -> object:
        seen.append(pool.num_usable - pool.num_free)
        return step(batch)  # type: ignore[arg-type]

    core.runner.step = watched  # type: ignore[method-assign, assignment]
    return seen


@pytest.mark.parametrize(
    ("model", "platform", "ahead"), diagonal(FAMILIES, PLATFORMS, [False, True]), indirect=["model"]
)
def test_freeing_changes_no_token(model: Path, platform: str, ahead: bool) -> None:
    rng = random.Random(1)
    prompts = [[rng.randrange(3, 250) for _ in range(length)] for length in LENGTHS]
    core = make_core(
        model, platform, block_size=SIZE, max_num_batched_tokens=STEP, max_num_seqs=4,
        async_scheduling=ahead, num_gpu_blocks_override=200,
    )  # fmt: skip
    assert core.scheduler.config.window == WINDOW
    kept = keeping(core)
    seen = peaks(kept)
    want = answer(kept, prompts, PARAMS)
    before = max(seen)
    seen = peaks(core)
    got = answer(core, prompts, PARAMS)
    assert [a.token_ids for a in got] == [a.token_ids for a in want]
    assert [a.logprobs for a in got] == [a.logprobs for a in want]
    assert max(seen) <= 4 * core.scheduler.blocks.limit
    assert max(seen) < before / 1.5
    warm = answer(core, prompts, PARAMS, first_id=100)
    assert core.scheduler.stats.prefix_cache_hits > 0
    assert [a.token_ids for a in warm] == [a.token_ids for a in want]


@pytest.mark.parametrize(("model", "platform"), diagonal(FAMILIES, PLATFORMS), indirect=["model"])
def test_a_pool_smaller_than_the_prompt(model: Path, platform: str) -> None:
    prompt = [random.Random(2).randrange(3, 250) for _ in range(400)]
    large = answer(make_core(model, platform, block_size=SIZE), [prompt], PARAMS)
    core = make_core(
        model, platform, block_size=SIZE, max_num_batched_tokens=STEP, max_num_seqs=4,
        max_model_len=512, num_gpu_blocks_override=10,
    )  # fmt: skip
    small = answer(core, [prompt], PARAMS)
    assert small[0].token_ids == large[0].token_ids
