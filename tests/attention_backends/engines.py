"""What whole engines must say over a backend whose kernels are another package's."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.plugins.selection import load_platform
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.platform import TorchPlatform
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core
from tests.platforms.torch.recordable import StagedPlatform, make_staged

__all__ = ["PagedEngine"]

SETTINGS: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_num_seqs": 10,
    "max_num_batched_tokens": 64,
    "max_model_len": 160,
}
RNG = random.Random(0)
PROMPTS = [[RNG.randrange(3, 250) for _ in range(RNG.randrange(1, 50))] for _ in range(11)]
PARAMS = SamplingParams(temperature=0.0, max_tokens=14)


class Attending(StagedPlatform):
    """The cpu platform, attending with one backend alone."""

    def __init__(self, tests: PagedEngine, *, records: bool) -> None:
        base = load_platform("cpu")
        assert isinstance(base, TorchPlatform)
        super().__init__(base)
        self._tests, self._records = tests, records
        self.capabilities = replace(self.capabilities, block_sizes=(tests.block_size,))

    def records_steps(self, config: RunnerConfig) -> bool:
        return self._records

    def attention_backends(self) -> list[Any]:
        return [self._tests.make(self.device)]


def tokens(core: Any, **more: Any) -> list[list[int]]:
    return [each.token_ids for each in answer(core, PROMPTS, PARAMS, **more)]


class PagedEngine(ABC):
    """The tests. A subclass names a backend, whose package must be emulated meanwhile."""

    block_size = 16

    @abstractmethod
    def make(self, device: torch.device) -> Any:
        """The backend."""

    @pytest.mark.parametrize("family", ["llama", "gemma2"])
    def test_tokens_are_those_of_the_reference(self, family: str, tmp_path: Path) -> None:
        model = make_checkpoint(family, tmp_path, head_dim=64)
        want = tokens(make_core(model, "reference", **SETTINGS))
        for records in (True, False):
            core = make_staged(model, Attending(self, records=records), **SETTINGS)
            name = self.make(torch.device("cpu")).name
            assert core.runner.describe()["attention"].startswith(name)
            assert tokens(core) == want
            assert tokens(core, first_id=100) == want  # from cached prefixes

    def test_drafts_are_checked_beside_replays(self, tmp_path: Path) -> None:
        model = make_checkpoint("llama", tmp_path, head_dim=64)
        drafts = {"method": "suffix", "num_speculative_tokens": 3, "adaptive": False}
        platform = Attending(self, records=True)
        core = make_staged(model, platform, **SETTINGS, speculative_config=drafts)
        want = tokens(make_core(model, "reference", **SETTINGS))
        assert tokens(core) == want
        assert core.stats().num_accepted_tokens > 0
