"""A platform whose steps are staged and recorded, in plain torch on any device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.contracts.platform import Memory
from dovetail.core.engine import build
from dovetail.core.engine.core import EngineCore
from dovetail.core.plugins.selection import load_platform
from dovetail.core.types import IntArray
from dovetail.platforms.torch.platform import TorchPlatform
from dovetail.platforms.torch.queue import DeviceQueue, HostQueue
from tests.engines import make_core

__all__ = ["PlainAttention", "StagedPlatform", "make_staged"]

_LONGEST = 256


@dataclass(frozen=True)
class _Plan:
    positions_T: Tensor
    rows_T: Tensor
    slots_T: Tensor
    width: Tensor
    tables: Tensor


class PlainAttention:
    """Every token gathers the keys of its row, up to the longest length that there is."""

    name = "plain"
    records_mixed = True

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def refuses(self, need: AttentionNeed) -> str | None:
        return "it is plain" if need.features else None

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        return 2 * need.block_size * spec.num_kv_heads * spec.head_size * 4

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> Tensor:
        shape = (2, num_blocks * need.block_size, spec.num_kv_heads, spec.head_size)
        return torch.zeros(shape, device=self.device)

    def host_plan(self, batch: Batch, need: AttentionNeed) -> tuple[IntArray, ...]:
        width = np.array([batch.block_tables.shape[1]], np.int32)
        slots = batch.slots(need.block_size).astype(np.int32)
        return batch.positions, batch.row_of_token, slots, width, batch.block_tables.ravel()

    def device_plan(self, arrays: Sequence[Tensor], batch: Batch, need: AttentionNeed) -> _Plan:
        self._size = need.block_size
        return _Plan(*arrays)

    def plan(self, batch: Batch, need: AttentionNeed) -> _Plan:
        arrays = [torch.from_numpy(a).to(self.device) for a in self.host_plan(batch, need)]
        return self.device_plan(arrays, batch, need)

    def attend(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cache: Any, plan: Any, spec: Any
    ) -> tuple[Tensor, Any]:
        cache[0, plan.slots_T], cache[1, plan.slots_T] = k_TKE, v_TKE
        keys = torch.arange(_LONGEST, device=q_THE.device)
        seen = keys <= plan.positions_T[:, None]
        place = plan.rows_T[:, None] * plan.width + keys // self._size
        block = plan.tables[torch.where(seen, place, 0)]
        slot = torch.where(seen, block * self._size + keys % self._size, 0)
        k, v = cache[0, slot], cache[1, slot]
        grouped = q_THE.unflatten(1, (spec.num_kv_heads, -1))
        scores = torch.einsum("tkge,tlke->tkgl", grouped, k) * spec.scale
        weights = scores.masked_fill(~seen[:, None, None], float("-inf")).softmax(-1)
        return torch.einsum("tkgl,tlke->tkge", weights, v).flatten(1, 2), cache

    def copy_blocks(self, caches: Sequence[Tensor], pairs: IntArray) -> Sequence[Tensor]:
        for cache in caches:
            blocks = cache.unflatten(1, (-1, self._size))
            for source, target in pairs.tolist():
                blocks[:, target] = blocks[:, source]
        return caches


class StagedPlatform(TorchPlatform):
    """Another platform, its steps given to a queue.

    Args:
        base: Whose device and memory there are.
        queue: Of the device.
    """

    name = "staged"

    def __init__(self, base: TorchPlatform, queue: DeviceQueue | None = None) -> None:
        self._base = base
        self._queue = queue or HostQueue()
        self.device = base.device
        self.capabilities = replace(
            base.capabilities,
            features=base.capabilities.features - {"deterministic"},
            static_shapes=False,
            mixed_batches=True,
            async_steps=True,
            graphs=True,
        )

    def device_names(self) -> list[str]:
        return self._base.device_names()

    def memory(self, device: int = 0) -> Memory:
        return self._base.memory(device)

    def queue(self) -> DeviceQueue:
        return self._queue

    def attention_backends(self) -> list[Any]:
        return [PlainAttention(self.device)]


def make_staged(model: Path, platform: TorchPlatform | None = None, **settings: Any) -> EngineCore:
    """A loaded engine on a staged platform, the CPU's by default."""
    if platform is None:
        base = load_platform("cpu")
        assert isinstance(base, TorchPlatform)
        platform = StagedPlatform(base)
    with patch.object(build, "load_platform", lambda *_: platform):
        return make_core(model, "cpu", **settings)
