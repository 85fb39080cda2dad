"""FlashAttention 3 and 2 over a paged cache.

Checked against the interface that they document, and emulations of it, only: neither has run on a
GPU yet. Signatures and rules are those of flash-attn 2.8.3.post2: ``flash_attn_interface.py`` and
``csrc/flash_attn/flash_api.cpp`` for version 2, and the same files of ``hopper/`` (3.0.0b1) for
version 3. Dao, 2023, arXiv 2307.08691; Shah et al., 2024, arXiv 2407.08608.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dovetail.attention_backends.pages import (
    Library,
    PagedAttention,
    PagedPlan,
    Slots,
    alone,
    page_runs,
    refuses_need,
)
from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import IntArray
from dovetail_cuda.order import Capability

__all__ = ["FlashAttention2", "FlashAttention3"]

_MOST_ENTRIES = 256
_HEAD_MULTIPLE = 8
_FA3_BLOCKS = (8, 16, 32)
"""Pages of 64 positions or more may be copied whole, with what nobody wrote in their ends."""
_FA2_BLOCK = 256
"""Its pages are multiples of this."""


@dataclass
class _Plan(PagedPlan):
    """A step."""

    lens_R: Tensor
    """Positions of each row, at least 1."""
    query_starts: Tensor
    """(R + 1,)"""
    page_starts: Tensor
    """(R + 1,) where each row's KV blocks begin in ``pages``."""
    pages: Tensor
    """Flat; longer than what the step has."""
    width: int
    """KV blocks of the longest row that the plan may be used for."""
    longest_query: int
    """At least 2: version 2 takes 1 for a promise that each row has a token."""
    _table_RM: Tensor | None = None

    def table(self, layer: int) -> Tensor:
        """KV blocks of each row, (R, width) int32, 0 behind its last; made by the first layer."""
        if self._table_RM is None or self.slots.begins(layer):
            columns = torch.arange(self.width, dtype=torch.int32, device=self.pages.device)
            place = self.page_starts[:-1, None] + columns
            mine = place < self.page_starts[1:, None]
            found = self.pages.index_select(0, torch.where(mine, place, 0).flatten())
            self._table_RM = torch.where(mine, found.view(mine.shape), 0)
        return self._table_RM


class _FlashAttention(PagedAttention[_Plan]):
    """What both versions share.

    Args:
        device: Of the tensors.
        capability: The GPU's; None: there is none.
    """

    name: str
    library: Library
    plan_type = _Plan

    def __init__(self, device: torch.device, capability: Capability | None) -> None:
        super().__init__(device)
        self._capability = capability

    def refuses(self, need: AttentionNeed) -> str | None:
        """Serves 16-bit models without ALiBi, on the GPUs that the version is for."""
        reason = self._refuses_gpu() or refuses_need(need) or self._refuses_block(need)
        if reason is not None:
            return reason
        for size in sorted(need.head_sizes):
            if size > _MOST_ENTRIES or size % _HEAD_MULTIPLE:
                return (
                    f"its heads have a multiple of {_HEAD_MULTIPLE} entries,"
                    f" up to {_MOST_ENTRIES}, not {size}"
                )
        return self.library.missing()

    @abstractmethod
    def _refuses_gpu(self) -> str | None: ...

    @abstractmethod
    def _refuses_block(self, need: AttentionNeed) -> str | None: ...

    def _function(self, name: str) -> Callable[..., Tensor]:
        return self.library.function(name)

    def host_plan(self, batch: Batch, need: AttentionNeed) -> tuple[IntArray, ...]:
        """Slots (T,), and the arrays of ``_Plan``."""
        runs = page_runs(batch, need.block_size)
        slots = batch.slots(need.block_size).astype(np.int32, copy=False)
        return slots, runs.lens, batch.query_starts, runs.starts, runs.pages

    def _planned(
        self, arrays: Sequence[Tensor], batch: Batch, need: AttentionNeed, longest: int
    ) -> _Plan:
        slots, lens, query_starts, page_starts, pages = arrays
        return _Plan(
            slots=Slots(slots, need.specs[0].layer),
            num_real=batch.num_tokens - batch.num_padding,
            alone=alone(batch),
            lens_R=lens,
            query_starts=query_starts,
            page_starts=page_starts,
            pages=pages,
            width=-(-longest // need.block_size),
            longest_query=max(2, int(batch.query_lens.max())),
        )


def _mask(spec: AttentionSpec) -> dict[str, Any]:
    """The arguments that both versions have in common."""
    left = -1 if spec.window is None else spec.window - 1
    return {
        "softmax_scale": spec.scale,
        "causal": True,
        "window_size": (left, -1 if spec.window is None else 0),
        "softcap": spec.soft_cap or 0.0,
    }


class FlashAttention3(_FlashAttention):
    """FlashAttention 3, for GPUs of compute capability 9.0 (Hopper)."""

    name = "flash3"
    library = Library(
        module="flash_attn_interface",
        install="pip install flash-attn-3, from the index of torch itself",
    )

    def _refuses_gpu(self) -> str | None:
        if self._capability is None:
            return "it needs an NVIDIA GPU of compute capability 9.0"
        if self._capability != (9, 0):
            major, minor = self._capability
            return f"it is for compute capability 9.0 (Hopper), not {major}.{minor}"
        return None

    def _refuses_block(self, need: AttentionNeed) -> str | None:
        if need.block_size in _FA3_BLOCKS:
            return None
        known = ", ".join(map(str, _FA3_BLOCKS))
        return (
            f"its KV blocks have {known} positions, not {need.block_size}:"
            " larger ones it may read whole, with what nobody wrote in them"
        )

    def _decode(self, q_RHE: Tensor, cache: Tensor, plan: _Plan, spec: AttentionSpec) -> Tensor:
        return self._function("flash_attn_with_kvcache")(
            q_RHE[:, None],
            cache[0],
            cache[1],
            cache_seqlens=plan.lens_R,
            page_table=plan.table(spec.layer),
            **_mask(spec),
        )[:, 0]

    def _extend(self, q_THE: Tensor, cache: Tensor, plan: _Plan, spec: AttentionSpec) -> Tensor:
        return self._function("flash_attn_with_kvcache")(
            q_THE,
            cache[0],
            cache[1],
            cache_seqlens=plan.lens_R,
            page_table=plan.table(spec.layer),
            cu_seqlens_q=plan.query_starts,
            max_seqlen_q=plan.longest_query,
            **_mask(spec),
        )


class FlashAttention2(_FlashAttention):
    """FlashAttention 2, for GPUs of compute capability 8.0 and more, in KV blocks of 256."""

    name = "flash2"
    library = Library(module="flash_attn", install="pip install flash-attn --no-build-isolation")

    def _refuses_gpu(self) -> str | None:
        if self._capability is None:
            return "it needs an NVIDIA GPU of compute capability 8.0 or more"
        if self._capability < (8, 0):
            major, minor = self._capability
            return f"it is for compute capability 8.0 and more, not {major}.{minor}"
        return None

    def _refuses_block(self, need: AttentionNeed) -> str | None:
        if need.block_size % _FA2_BLOCK == 0:
            return None
        return (
            f"its KV blocks have a multiple of {_FA2_BLOCK} positions, not {need.block_size}:"
            f" --block-size {_FA2_BLOCK}"
        )

    def _decode(self, q_RHE: Tensor, cache: Tensor, plan: _Plan, spec: AttentionSpec) -> Tensor:
        return self._function("flash_attn_with_kvcache")(
            q_RHE[:, None],
            cache[0],
            cache[1],
            cache_seqlens=plan.lens_R,
            block_table=plan.table(spec.layer),
            **_mask(spec),
        )[:, 0]

    def _extend(self, q_THE: Tensor, cache: Tensor, plan: _Plan, spec: AttentionSpec) -> Tensor:
        key_starts = functional.pad(plan.lens_R.cumsum(0, dtype=torch.int32), (1, 0))
        return self._function("flash_attn_varlen_func")(
            q_THE,
            cache[0],
            cache[1],
            plan.query_starts,
            key_starts,
            plan.longest_query,
            plan.width * cache.shape[2],
            block_table=plan.table(spec.layer),
            **_mask(spec),
        )
