"""Plans: the arithmetic by hand, what is suggested, and that a start agrees."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dovetail.core.config.checkpoint import read_facts
from dovetail.core.config.plan import EnginePlan, plan_engine, remedies
from dovetail.core.config.plan_report import memory_bar, plan_json, plan_text, setting_reasons
from dovetail.core.config.schema import EngineConfig
from dovetail.core.contracts.platform import Adjustment, Capabilities, Memory, Platform
from dovetail.core.contracts.runner import Runner, RunnerConfig, RunnerPlan
from dovetail.core.engine.build import build_engine, ignore_progress
from dovetail.core.plugins.selection import load_platform

WEIGHTS, STEP, PER_TOKEN = 1000, 10, 4
"""Bytes that the toy takes: for weights, for each token of a step, for each cached token."""


class ToyRunner:
    """Plans, and does nothing else."""

    def __init__(self, config: RunnerConfig, window: int | None) -> None:
        self._config = config
        self._window = window

    def plan(self) -> RunnerPlan:
        config = self._config
        item = {"float32": 2, "bfloat16": 1, "int8": 0.5}
        return RunnerPlan(
            weight_bytes=WEIGHTS * int(item[config.dtype]),
            step_bytes=STEP * config.max_num_batched_tokens,
            bytes_per_block=int(PER_TOKEN * config.block_size * item[config.kv_dtype]),
            window=self._window,
            choices={"attention": "toy (the only one)"},
        )


class ToyPlatform(Platform):
    name = "toy"
    capabilities = Capabilities(
        family="toy",
        dtypes=("bfloat16", "float32"),
        kv_dtypes=("auto", "int8"),
        block_sizes=(8,),
        max_num_batched_tokens=512,
        max_num_seqs=4,
    )

    def __init__(self, window: int | None = None) -> None:
        self._window = window

    def device_names(self) -> list[str]:
        return ["a toy"]

    def memory(self, device: int = 0) -> Memory:
        return Memory(free=10_000, total=20_000)

    def runner(self, config: RunnerConfig) -> Runner:
        return ToyRunner(config, self._window)  # type: ignore[return-value]

    def adjust(self, settings: Mapping[str, Any]) -> list[Adjustment]:
        return [Adjustment(field="enable_prefix_caching", value=False, reason="a toy forgets")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model that is nothing but its config."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 100,
        "max_position_embeddings": 256,
        "dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path


def plan(folder: Path, memory: int, *, window: int | None = None, **settings: Any) -> EnginePlan:
    intent = make_intent(folder, **settings)
    device = Memory(free=memory, total=memory)
    return plan_engine(intent, read_facts(intent), ToyPlatform(window), device)


def make_intent(folder: Path, **settings: Any) -> EngineConfig:
    given = {"model": str(folder), "load_format": "dummy", "gpu_memory_utilization": 1.0}
    return EngineConfig.from_kwargs(**(given | settings))


TAKEN = WEIGHTS + 512 * STEP
ALL = 4 * 256 * PER_TOKEN
"""The cache of as many requests of the model's length as run at once."""


def test_what_it_takes_is_added_up(folder: Path) -> None:
    found = plan(folder, TAKEN + ALL + 77)
    assert (found.fits, found.shortfall, found.left) == (True, 0, 77)
    assert (found.num_blocks, found.num_tokens, found.cache_bytes) == (128, 1024, ALL)
    assert found.bytes_per_token == PER_TOKEN
    assert [found.num_requests(length) for length in (256, 128, 8)] == [4, 4, 4]


def test_fewer_requests_where_the_cache_is_small(folder: Path) -> None:
    found = plan(folder, TAKEN + ALL // 2)
    assert [found.num_requests(length) for length in (256, 128, 100)] == [2, 4, 4]


def test_a_length_that_was_left_open_is_cut_to_what_fits(folder: Path) -> None:
    found = plan(folder, TAKEN + 100 * PER_TOKEN)
    assert (found.fits, found.resolved.max_model_len) == (True, 96)
    assert "96 tokens per sequence fit" in found.resolved.reasons["max_model_len"]


def test_the_shortfall_is_exact(folder: Path) -> None:
    wish = {"max_model_len": 256, "gpu_memory_utilization": 0.5}
    short = plan(folder, TAKEN + 256 * PER_TOKEN, **wish)
    assert (short.fits, short.shortfall) == (False, 256 * PER_TOKEN)
    assert plan(folder, short.memory.free + short.shortfall, **wish).fits
    assert not plan(folder, short.memory.free + short.shortfall - 1, **wish).fits


def test_weights_that_do_not_fit_by_themselves(folder: Path) -> None:
    short = plan(folder, 500)
    assert (short.fits, short.shortfall) == (False, TAKEN + 8 * PER_TOKEN - 500)
    assert "weights and a step alone take 6.1 kB, and 500 bytes are free" in short.reason


def test_a_window_bounds_what_a_request_holds(folder: Path) -> None:
    settings = {"max_num_batched_tokens": 16, "window": 16}
    found = plan(folder, 10_000, **settings)
    assert found.num_requests(256) == 4
    # 16 positions of window and 16 of a step are 4 blocks, and 2 are held in part.
    assert found.num_blocks == 4 * 6


def test_a_cache_of_a_given_size_has_to_fit(folder: Path) -> None:
    found = plan(folder, TAKEN + 80, num_gpu_blocks_override=64)
    assert (found.fits, found.shortfall) == (False, 64 * 8 * PER_TOKEN - 80)
    small = plan(folder, 50_000, kv_cache_memory_bytes=64, max_model_len=256)
    assert (small.fits, small.shortfall) == (False, 0)


def suggested(folder: Path, memory: int, **settings: Any) -> dict[str, EnginePlan]:
    intent = make_intent(folder, **settings)
    facts, device = read_facts(intent), Memory(free=memory, total=memory)

    def again(changed: EngineConfig) -> EnginePlan:
        return plan_engine(changed, facts, ToyPlatform(), device)

    first = again(intent)
    assert not first.fits
    return {fix.flags: fix.plan for fix in remedies(first, intent, again)}


def test_every_suggestion_fits_and_the_length_is_the_longest(folder: Path) -> None:
    found = suggested(folder, TAKEN + 100 * PER_TOKEN, max_model_len=256)
    assert list(found) == ["--max-model-len 96", "--max-num-batched-tokens 256"]
    assert all(fix.fits for fix in found.values())
    assert not plan(folder, TAKEN + 100 * PER_TOKEN, max_model_len=104).fits


def test_a_smaller_cache_dtype_is_suggested_where_the_platform_has_it(folder: Path) -> None:
    found = suggested(folder, TAKEN + 128 * PER_TOKEN, max_model_len=256)
    assert "--kv-cache-dtype int8" in found
    assert not any("fp8" in flags for flags in found)


def test_what_helps_only_together_is_suggested_together(folder: Path) -> None:
    memory = WEIGHTS + 256 * STEP + 4 * 8
    (flags,) = suggested(folder, memory, max_model_len=16, dtype="float32", kv_cache_dtype="int8")
    assert flags == "--dtype bfloat16 --max-num-batched-tokens 256"


def test_where_nothing_helps_nothing_is_suggested(folder: Path) -> None:
    assert suggested(folder, 100) == {}


def test_each_setting_has_its_reason(folder: Path) -> None:
    intent = make_intent(folder, max_num_seqs=3)
    reasons = setting_reasons(plan(folder, 100_000, max_num_seqs=3), intent)
    assert reasons["dtype"] == "the checkpoint is bfloat16"
    assert reasons["max_num_seqs"] == reasons["memory_utilization"] == "as asked for"
    assert reasons["enable_prefix_caching"] == "a toy forgets (platform toy)"
    assert reasons["block_size"] == "the platform's favourite"
    assert reasons["seed"] == "default"


def test_the_bar_is_to_scale() -> None:
    resolved: Any = None
    runner = RunnerPlan(weight_bytes=32, step_bytes=16, bytes_per_block=1, window=None, choices={})
    fitting = EnginePlan(
        resolved=resolved,
        runner=runner,
        memory=Memory(free=112, total=128),
        num_blocks=32,
        reason="",
        fits=True,
        shortfall=0,
    )
    bar = "[" + "x" * 8 + "W" * 16 + "s" * 8 + "K" * 16 + "." * 16 + "]"
    assert memory_bar(fitting, colour=False).splitlines()[0] == bar
    assert "\x1b[34m" + "█" * 16 in memory_bar(fitting, colour=True)
    short = replace(fitting, memory=Memory(free=40, total=40), fits=False, shortfall=40)
    first, mark, _ = memory_bar(short, colour=False).splitlines()
    assert first.count("W") == round(64 * 32 / 80)
    assert mark.index("^") == 1 + round(64 * 40 / 80)


def test_text_and_json_say_the_same(folder: Path) -> None:
    found, intent = plan(folder, TAKEN + ALL), make_intent(folder)
    facts = read_facts(intent)
    text = plan_text(found, facts, intent, (), typical=128, colour=False)
    assert "It fits: 1,024 tokens in the cache" in text
    assert "Requests at once: 4 of 256 tokens or 4 of 128 tokens" in text
    assert "attention  toy (the only one)" in text
    assert "a toy forgets (platform toy)" in text
    data = json.loads(plan_json(found, facts, intent, (), typical=128))
    assert (data["fits"], data["kv_cache"]["num_tokens"]) == (True, 1024)
    assert data["num_requests"] == {"256": 4, "128": 4}
    assert data["settings"]["kv_dtype"] == {"value": "bfloat16", "reason": "as the activations"}


@pytest.mark.parametrize("device", ["null", "reference"])
def test_a_start_agrees(device: str) -> None:
    """With a cache of a given size, so that the memory that is free now does not matter."""
    settings = {"kv_cache_memory_bytes": 3_000_000, "max_num_seqs": 2, "dtype": "float32"}
    intent = EngineConfig.from_kwargs(**settings)
    platform = load_platform(device)
    planned = plan_engine(intent, read_facts(intent), platform, platform.memory())
    built = build_engine(intent, device, ignore_progress)
    assert planned.num_blocks == built.num_blocks
    assert planned.resolved.max_model_len == built.config.max_model_len
    assert planned.resolved.runner_config() == built.config.runner_config()
