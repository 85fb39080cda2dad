"""What a plan says before loading is what loading then does."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from dovetail.core.config.checkpoint import read_facts
from dovetail.core.config.resolve import resolve
from dovetail.core.config.schema import EngineConfig
from dovetail.core.contracts.runner import Runner
from dovetail.core.errors import SelectionError, UnsupportedError
from dovetail.core.plugins.quant import quant_registry
from dovetail.core.plugins.selection import load_platform
from tests.checkpoints import FAMILIES, make_checkpoint


def make_runner(path: Path, platform_name: str = "cpu", **settings: Any) -> Runner:
    config = EngineConfig.from_kwargs(model=str(path), **settings)
    platform = load_platform(platform_name)
    native = settings.get("model_impl") is None
    schemes = quant_registry().names()
    resolved = resolve(config, read_facts(config), platform, native, schemes=schemes)
    return platform.runner(resolved.runner_config())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_agrees_with_loading(family: str, tmp_path: Path) -> None:
    runner = make_runner(make_checkpoint(family, tmp_path), dtype="float32")
    plan = runner.plan()
    total = [total for _, total in runner.load()][-1]
    spec = runner.cache_spec()
    assert (plan.bytes_per_block, plan.window) == (spec.bytes_per_block, spec.window)
    assert plan.choices == runner.describe()
    # Position tables come on top, and an output layer that is tied counts by itself.
    assert total <= plan.weight_bytes <= 2 * total


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_a_plan_knows_what_a_scheme_saves(scheme: str, tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    plain = make_runner(path, dtype="float32")
    runner = make_runner(path, dtype="float32", quantization=scheme)
    loaded = [[done for done, _ in each.load()][-1] for each in (plain, runner)]
    saved = plain.plan().weight_bytes - runner.plan().weight_bytes
    assert saved == loaded[0] - loaded[1] > loaded[0] / 3


def test_weights_are_counted_without_reading_them(tmp_path: Path) -> None:
    path = make_checkpoint("qwen3", tmp_path, tie_word_embeddings=True)
    with_weights = make_runner(path).plan()
    for file in path.glob("*.safetensors"):
        file.unlink()
    assert make_runner(path, load_format="dummy").plan() == with_weights


def test_a_draft_model_comes_on_top(tmp_path: Path) -> None:
    runner = make_runner(make_checkpoint("llama", tmp_path))
    alone = runner.plan()
    config = runner._config  # type: ignore[attr-defined]
    both = load_platform("cpu").runner(dataclasses.replace(config, draft=config)).plan()
    assert both.weight_bytes == 2 * alone.weight_bytes
    assert both.bytes_per_block == 2 * alone.bytes_per_block


def test_what_loading_would_refuse_is_refused(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    with pytest.raises(SelectionError, match="no attention backend 'nope'"):
        make_runner(path, attention_backend="nope").plan()
    with pytest.raises(UnsupportedError, match="once its weights are read"):
        make_runner(path, model_impl="transformers").plan()


def test_platforms_without_a_model_plan_their_cache(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    for name in ("null", "oracle"):
        runner = make_runner(path, name)
        plan = runner.plan()
        assert plan.weight_bytes == plan.step_bytes == 0
        assert plan.bytes_per_block == runner.cache_spec().bytes_per_block
        assert plan.choices == runner.describe()
