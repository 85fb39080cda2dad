"""Engines of the cpu platform with the kernels of one instruction set, and steps given by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dovetail_cpu import platform
from dovetail_cpu.kernels import Kernels
from torch import Tensor

from dovetail.core.batch import Batch, SamplingBatch
from dovetail.core.contracts.model import StepInputs
from dovetail.core.engine.core import EngineCore
from tests.engines import make_core

__all__ = ["BLOCK_SIZE", "Machine", "Row", "make_cpu_core"]

BLOCK_SIZE = 16


def make_cpu_core(
    path: Path, kernels: Kernels | None, patch: pytest.MonkeyPatch, **settings: Any
) -> EngineCore:
    """In bfloat16; without kernels: by torch alone."""
    patch.setattr(platform, "load_kernels", lambda: kernels)
    fixed = {"dtype": "bfloat16", "block_size": BLOCK_SIZE, "max_model_len": 320}
    return make_core(path, "cpu", **(fixed | settings))


@dataclass(frozen=True)
class Row:
    """Tokens of a sequence that a step computes."""

    token_ids: Sequence[int]
    begin: int
    """Position of the first."""
    blocks: Sequence[int]


class Machine:
    """A model and a cache of its own.

    Args:
        model: Recorded or not.
        core: Whose attention it is bound to.
        num_blocks: Of the cache.
    """

    def __init__(self, model: Any, core: EngineCore, num_blocks: int = 64) -> None:
        runner: Any = core.runner
        self.loaded = runner._loaded
        self.model = model
        attention, need = self.loaded.attention, self.loaded.need
        self.caches = [attention.allocate(spec, need, num_blocks) for spec in need.specs]

    def step(self, rows: Sequence[Row]) -> Tensor:
        """Hidden states (T, D), the caller's own. No two tokens may have one place in the cache."""
        batch = _batch(rows)
        slots = batch.slots(BLOCK_SIZE)
        assert len(np.unique(slots)) == len(slots), "which of them stays is left to the threads"
        inputs = StepInputs(
            token_ids_T=torch.from_numpy(batch.token_ids).long(),
            positions_T=torch.from_numpy(self.model.positions(batch.positions)).long(),
            plan=self.loaded.attention.plan(batch, self.loaded.need),
        )
        with torch.inference_mode():
            hidden, self.caches = self.model.forward(inputs, self.caches)
            return hidden.clone()


def _batch(rows: Sequence[Row]) -> Batch:
    none = np.zeros(0, np.int32)
    width = max(len(row.blocks) for row in rows)
    tables = [[*row.blocks, *[0] * (width - len(row.blocks))] for row in rows]
    return Batch(
        step=0,
        rows=np.arange(len(rows)),
        query_lens=np.array([len(row.token_ids) for row in rows], np.int32),
        context_lens=np.array([row.begin for row in rows], np.int32),
        block_tables=np.array(tables, np.int32),
        token_ids=np.concatenate([np.array(row.token_ids, np.int32) for row in rows]),
        carried=none,
        carried_rows=none,
        sampled=none,
        sampling=SamplingBatch.greedy(0),
        copies=np.zeros((0, 2), np.int32),
    )
