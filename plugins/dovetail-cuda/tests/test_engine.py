"""Whole engines whose steps are recorded and replayed over the emulations."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from dovetail_cuda.flash import FlashAttention2, FlashAttention3
from dovetail_cuda.flashinfer import FlashInferAttention, _Planner

from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.plugins.selection import load_platform
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.platform import TorchPlatform
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core
from tests.platforms.torch.recordable import StagedPlatform, make_staged

pytestmark = pytest.mark.usefixtures("emulated")

SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_num_seqs": 10,
    "max_num_batched_tokens": 64,
    "max_model_len": 160,
}
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, 250) for _ in range(RNG.randrange(1, 50))] for _ in range(11)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=14)
BACKENDS: list[Any] = [FlashInferAttention, FlashAttention3, FlashAttention2]


class Emulated(StagedPlatform):
    """Attends with one of this package's backends."""

    def __init__(self, backend: Any, *, records: bool) -> None:
        base = load_platform("cpu")
        assert isinstance(base, TorchPlatform)
        super().__init__(base)
        self._backend, self._records = backend, records
        size = 256 if backend is FlashAttention2 else 16
        self.capabilities = replace(self.capabilities, block_sizes=(size,))

    def records_steps(self, config: RunnerConfig) -> bool:
        return self._records

    def attention_backends(self) -> list[Any]:
        return [self._backend(self.device, (9, 0))]


def tokens(core: Any, **more: Any) -> list[list[int]]:
    return [each.token_ids for each in answer(core, PROMPTS, PARAMS, **more)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_tokens_are_those_of_the_reference(family: str, backend: Any, tmp_path: Path) -> None:
    model = make_checkpoint(family, tmp_path, head_dim=64)
    want = tokens(make_core(model, "reference", **SETTINGS))
    for records in (True, False):
        core = make_staged(model, Emulated(backend, records=records), **SETTINGS)
        assert core.runner.describe()["attention"].startswith(backend.name)
        assert tokens(core) == want
        assert tokens(core, first_id=100) == want  # from cached prefixes


@pytest.mark.parametrize("backend", BACKENDS)
def test_drafts_are_checked_beside_replays(backend: Any, tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path, head_dim=64)
    drafts = {"method": "suffix", "num_speculative_tokens": 3, "adaptive": False}
    platform = Emulated(backend, records=True)
    core = make_staged(model, platform, **SETTINGS, speculative_config=drafts)
    want = tokens(make_core(model, "reference", **SETTINGS))
    assert tokens(core) == want
    assert core.stats().num_accepted_tokens > 0


def test_a_plan_waits_until_the_one_before_is_copied() -> None:
    done: list[str] = []

    class Event:
        def synchronize(self) -> None:
            done.append("wait")

        def record(self) -> None:
            done.append("mark")

    class Wrapper:
        def plan(self, *arrays: Any, **arguments: Any) -> None:
            done.append("plan")

    event: Any = Event()
    planner = _Planner(Wrapper(), event)
    planner.plan()
    planner.plan()
    assert done == ["wait", "plan", "mark"] * 2
