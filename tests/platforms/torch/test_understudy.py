"""A small model compiles what the real one will need, and never stands in its way."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dovetail.core.contracts.platform import Memory
from dovetail.core.plugins.selection import load_platform
from dovetail.platforms.torch import understudy
from dovetail.platforms.torch.platform import TorchPlatform
from dovetail.platforms.torch.understudy import Understudy, understudied
from tests.checkpoints import make_checkpoint
from tests.engines import GREEDY, answer, make_core
from tests.platforms.torch.recordable import StagedPlatform, make_staged

SMALL: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 96}
PROMPTS = [[5, 6, 7], [9] * 30]


class Compiling(StagedPlatform):
    """Notes, for every kernel that it is asked for, in which thread and for which sizes."""

    compiles_kernels = True

    def __init__(self, free: int | None = None) -> None:
        base = load_platform("cpu")
        assert isinstance(base, TorchPlatform)
        super().__init__(base)
        self.free = free
        self.seen: dict[str, set[tuple[int, ...]]] = {}

    def memory(self, device: int = 0) -> Memory:
        found = super().memory(device)
        return found if self.free is None else replace(found, free=self.free)

    def choose(self, logits_GV: Any, controls: Any, *, restricts: bool = True) -> Any:
        name = threading.current_thread().name
        kind = (*logits_GV.shape, controls is None, restricts)
        self.seen.setdefault(name, set()).add(kind)
        return super().choose(logits_GV, controls, restricts=restricts)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_it_meets_every_size_first(family: str, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path)
    platform = Compiling()
    core = make_staged(model, platform, **SMALL)
    assert platform.seen["understudy"] >= platform.seen["MainThread"]
    assert len(platform.seen["understudy"]) > 2
    got = [a.token_ids for a in answer(core, PROMPTS)]
    assert got == [a.token_ids for a in answer(make_core(model, "reference", **SMALL), PROMPTS)]


class OnlyCompiling(Compiling):
    """Notes what is asked for where nothing is to be computed."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: dict[str, bool] = {}
        self.only = threading.local()

    @contextmanager
    def only_compiling(self) -> Iterator[None]:
        self.only.on = True
        try:
            yield
        finally:
            self.only.on = False

    def choose(self, logits_GV: Any, controls: Any, *, restricts: bool = True) -> Any:
        name, inside = threading.current_thread().name, getattr(self.only, "on", False)
        self.inside[name] = self.inside.get(name, inside) and inside
        return super().choose(logits_GV, controls, restricts=restricts)


def test_it_only_compiles_where_the_platform_can(tmp_path: Path) -> None:
    platform = OnlyCompiling()
    core = make_staged(make_checkpoint("llama", tmp_path), platform, **SMALL)
    assert platform.inside == {"understudy": True, "MainThread": False}
    assert answer(core, PROMPTS)


def test_where_memory_is_short_there_is_none(tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path)
    platform = Compiling(free=1 << 20)
    make_staged(model, platform, num_gpu_blocks_override=20, **SMALL)
    assert "understudy" not in platform.seen


def test_its_failure_is_told_and_harms_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(config: Any) -> None:
        raise RuntimeError("no such kernel")

    core = make_core(make_checkpoint("llama", tmp_path), "cpu", **SMALL)
    config = core.runner._config  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING, understudy.__name__):
        Understudy(fail, config).wait()
    assert "no such kernel" in caplog.text
    assert answer(core, PROMPTS, GREEDY)


def test_only_the_depth_differs(tmp_path: Path) -> None:
    core = make_core(make_checkpoint("gemma2", tmp_path), "cpu", **SMALL)
    config = core.runner._config  # type: ignore[attr-defined]
    deep = replace(config, hf_config=config.hf_config | {"num_hidden_layers": 40})
    small = understudied(deep)
    assert small.hf_config["num_hidden_layers"] == 2
    assert small.load_format == "dummy"
    changed = {k for k, v in deep.hf_config.items() if small.hf_config[k] != v}
    assert changed <= {"num_hidden_layers", "layer_types"}
