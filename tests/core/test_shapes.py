"""Steps in few sizes, in the shared runner, over a host that pretends to compile each of them."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dovetail.core.buckets import Buckets
from dovetail.core.config.checkpoint import read_facts
from dovetail.core.config.resolve import resolve
from dovetail.core.config.schema import EngineConfig
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.engine.build import scheduler_config
from dovetail.core.engine.core import EngineCore
from dovetail.core.errors import UnsupportedError
from dovetail.core.plugins.selection import load_platform
from dovetail.core.request import SamplingParams
from dovetail.core.scheduler.scheduler import Scheduler
from dovetail.core.shapes import FreeShapes, PaddedShapes
from dovetail.platforms.torch.platform import TorchPlatform
from tests.checkpoints import make_checkpoint
from tests.core.test_buckets import make_batch
from tests.engines import answer, make_core

SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 64,
    "max_model_len": 160,
}
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, 250) for _ in range(length)] for length in (1, 17, 40, 90, 3)]
BUCKETS = Buckets(decode=(1, 4), tokens=(8, 64), blocks=(4, 16))


def reference() -> TorchPlatform:
    platform = load_platform("reference", {})
    assert isinstance(platform, TorchPlatform)
    return platform


def static(platform: TorchPlatform) -> TorchPlatform:
    """The same, with static shapes."""
    platform.capabilities = replace(platform.capabilities, static_shapes=True, mixed_batches=False)
    return platform


def make_static_core(model: Path, **settings: Any) -> EngineCore:
    config = EngineConfig.from_kwargs(model=str(model), **SETTINGS, **settings)
    facts, platform = read_facts(config), static(reference())
    resolved = resolve(config, facts, platform, True)
    runner = platform.runner(resolved.runner_config())
    for _ in runner.load():
        pass
    runner.allocate(64)
    assert len(list(runner.warm_up())) > 2
    return EngineCore(Scheduler(scheduler_config(resolved, 64, runner.cache_spec().window)), runner)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("gemma2", tmp_path_factory.mktemp("gemma"))


def test_padded_steps_give_what_others_give(gemma: Path) -> None:
    params = [
        SamplingParams(temperature=0.0, max_tokens=20, logprobs=2),
        SamplingParams(temperature=0.8, top_p=0.9, max_tokens=20),
        SamplingParams(temperature=0.0, max_tokens=3, prompt_logprobs=2),
        SamplingParams(temperature=0.8, presence_penalty=1.0, max_tokens=20),
        SamplingParams(temperature=0.0, max_tokens=20),
    ]
    got = answer(make_static_core(gemma), PROMPTS, params)
    want = answer(make_core(gemma, "reference", **SETTINGS), PROMPTS, params)
    assert [each.token_ids for each in got] == [each.token_ids for each in want]
    assert [each.logprobs for each in got] == [
        pytest.approx(each.logprobs, abs=1e-4) for each in want
    ]


def test_tokens_are_chosen_on_the_host_where_shapes_are_static() -> None:
    platform = reference()
    assert platform.sampling_device == platform.device
    assert static(platform).sampling_device.type == "cpu"


def test_default_sizes_hold_every_step() -> None:
    config = runner_config(max_num_seqs=6, max_num_batched_tokens=100, max_model_len=161)
    buckets = reference().buckets(config)
    assert buckets.decode == (1, 2, 4, 6)
    assert buckets.tokens == (32, 64, 100)
    assert buckets.blocks == (8, 11)


def test_a_draft_model_is_refused_where_shapes_are_static() -> None:
    config = runner_config(max_num_seqs=4, max_num_batched_tokens=64, max_model_len=160)
    with pytest.raises(UnsupportedError, match="ngram and suffix need none"):
        static(reference()).runner(replace(config, draft=config))


def runner_config(**more: Any) -> RunnerConfig:
    return RunnerConfig(
        model_path=Path(),
        hf_config={},
        model_impl="native",
        load_format="dummy",
        dtype="float32",
        kv_dtype="float32",
        block_size=16,
        **more,
    )


def padded_shapes(max_num_seqs: int = 4, max_drafts: int = 0) -> PaddedShapes:
    config = runner_config(max_num_seqs=max_num_seqs, max_num_batched_tokens=64, max_model_len=160)
    return PaddedShapes(BUCKETS, replace(config, max_drafts=max_drafts))


@pytest.mark.parametrize("drafts", [0, 7])
def test_logits_are_made_for_one_number_of_rows_in_each_shape(drafts: int) -> None:
    shapes = padded_shapes(max_drafts=drafts)
    decode, small, large = (
        shapes.step(make_batch(lens, [0] * len(lens))) for lens in ([1, 1], [3, 2], [40, 1])
    )
    for step, size in ((decode, 4), (small, 8), (large, 16 if not drafts else 32)):
        for count in (1, 2, 5, 16, 33):
            index = np.arange(count, dtype=np.int32) + 7
            groups = list(shapes.logit_rows(index, step))
            assert {len(rows) for rows, _ in groups} == {size}
            meant = np.concatenate([rows[:n] for rows, n in groups])
            assert np.array_equal(meant, index)


def test_blocks_are_copied_in_groups_of_one_size_and_in_order() -> None:
    pairs = np.arange(1, 23, dtype=np.int32).reshape(11, 2)
    groups = list(padded_shapes().copies(pairs))
    assert len({group.shape for group in groups}) == 1
    every = np.concatenate(groups)
    assert np.array_equal(every[:11], pairs) and not every[11:].any()
    assert not list(padded_shapes().copies(pairs[:0]))


def test_rehearsals_are_every_shape_and_touch_block_0_alone() -> None:
    seen = []
    for name, batch in padded_shapes().rehearsals():
        assert name and not batch.block_tables.any() and not batch.copies.any()
        seen.append((batch.num_tokens, batch.num_rows, batch.block_tables.shape[1]))
        assert BUCKETS.shape_of(batch) == seen[-1]
    assert seen == list(BUCKETS.shapes())


def test_free_shapes_leave_everything_as_it_is() -> None:
    shapes, batch = FreeShapes(), make_batch([3, 2], [0, 5])
    assert shapes.step(batch) is batch
    index = np.arange(5, dtype=np.int32)
    assert [(len(rows), n) for rows, n in shapes.logit_rows(index, batch)] == [(5, 5)]
    assert [n for _, n in shapes.logit_rows(index, batch, 2)] == [2, 2, 1]
    pairs = np.ones((3, 2), np.int32)
    assert [group is pairs for group in shapes.copies(pairs)] == [True]
    assert [name for name, _ in shapes.rehearsals()] == ["prefill", "decode"]
