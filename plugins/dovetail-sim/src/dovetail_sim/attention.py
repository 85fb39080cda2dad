"""Attention of the simulated device: keys lie transposed, and no shape depends on data.

Queries go in tiles: one query token of each row in a decode step, else up to 16 of one row. How
many tiles there are follows from (T, R, M) alone; those that are too many compute nothing of use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import ITEM_SIZE, IntArray

__all__ = ["BLOCK_SIZES", "SimAttention"]

BLOCK_SIZES = (16, 32)
"""Positions per KV block that the matrix unit can read as columns."""
_TILE = 16


class _Cache(NamedTuple):
    """A layer's keys and values."""

    keys_BKEP: Tensor
    values_BKPE: Tensor


@dataclass(frozen=True)
class _Plan:
    """I tiles of Q query tokens each."""

    blocks_T: Tensor
    offsets_T: Tensor
    tables_IM: Tensor
    positions_IQ: Tensor
    tokens_IQ: Tensor
    """Index into the T tokens; 0 where a tile has no more."""
    places_T: Tensor
    """Where each token is among the I * Q."""


class SimAttention:
    """See ``core/contracts/attention.py``."""

    name = "sim"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def refuses(self, need: AttentionNeed) -> str | None:
        """Serves windows and soft caps over plain floats."""
        if "alibi" in need.features:
            return "its tiles have no bias per head, as ALiBi needs"
        if need.deterministic:
            return "it sums over as many keys as the step's block tables have"
        if need.kv_dtype not in ITEM_SIZE:
            return f"it keeps {', '.join(ITEM_SIZE)}, not {need.kv_dtype}"
        if need.block_size not in BLOCK_SIZES:
            return f"its matrix unit reads blocks of 16 or 32 positions, not {need.block_size}"
        return None

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys and values of one block."""
        entries = 2 * need.block_size * spec.num_kv_heads * spec.head_size
        return entries * ITEM_SIZE[need.kv_dtype]

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> _Cache:
        """Zeros: what nobody has written is masked, but must be finite."""
        dtype = getattr(torch, need.kv_dtype)
        outer, size = (num_blocks, spec.num_kv_heads), spec.head_size
        return _Cache(
            torch.zeros(*outer, size, need.block_size, dtype=dtype, device=self.device),
            torch.zeros(*outer, need.block_size, size, dtype=dtype, device=self.device),
        )

    def plan(self, batch: Batch, need: AttentionNeed) -> _Plan:
        """Cut the step into tiles; everything reaches the device in one copy."""
        decodes = batch.num_tokens == batch.num_rows
        size = 1 if decodes else _TILE
        # Tokens of no row are one more, whose blocks are all block 0: what a row computes, even if
        # it is not finite, reaches neither them nor, through them, block 0.
        lens = np.append(batch.query_lens, batch.num_padding)
        tables_RM = np.pad(batch.block_tables, ((0, 1), (0, 0)))
        num_tiles = batch.num_tokens if decodes else batch.num_tokens // size + len(lens)
        tiles_of_row = -(-lens // size)
        row_of_tile = np.full(num_tiles, len(lens) - 1)
        row_of_tile[: tiles_of_row.sum()] = np.arange(len(lens)).repeat(tiles_of_row)
        first_token, first_tile = np.cumsum(lens) - lens, np.cumsum(tiles_of_row) - tiles_of_row
        number = np.arange(batch.num_tokens, dtype=np.int32)
        places = number + (first_tile * size - first_token).repeat(lens)
        tokens, positions = np.zeros((2, num_tiles * size), np.int32)
        tokens[places], positions[places] = number, batch.positions
        return _Plan(
            *self._sent(
                *np.divmod(batch.slots(need.block_size), need.block_size),
                tables_RM[row_of_tile],
                positions.reshape(num_tiles, size),
                tokens.reshape(num_tiles, size),
                places,
            )
        )

    def _sent(self, *arrays: IntArray) -> list[Tensor]:
        """The arrays on the device, in one copy."""
        flat = np.concatenate([array.ravel() for array in arrays])
        there = torch.from_numpy(flat).to(self.device, torch.long)
        parts = torch.split(there, [array.size for array in arrays])
        return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]

    def attend(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        cache: _Cache,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Tensor, _Cache]:
        """Write, then attend tile by tile. The cache is changed in place."""
        if not isinstance(plan, _Plan):
            raise TypeError(f"a plan of another backend: {type(plan).__name__}")
        at = (plan.blocks_T, plan.offsets_T)
        cache.keys_BKEP.permute(0, 3, 1, 2)[at] = k_TKE.to(cache.keys_BKEP.dtype)
        cache.values_BKPE.permute(0, 2, 1, 3)[at] = v_TKE.to(cache.values_BKPE.dtype)
        out_IQHE = _attend_tiles(q_THE[plan.tokens_IQ], cache, plan, spec)
        return out_IQHE.flatten(0, 1)[plan.places_T], cache

    def copy_blocks(self, caches: Sequence[_Cache], pairs: IntArray) -> Sequence[_Cache]:
        """Copy in place, in every layer."""
        source, target = torch.from_numpy(pairs).to(self.device, torch.long).unbind(1)
        for cache in caches:
            for part in cache:
                part[target] = part[source]
        return caches


def _attend_tiles(q_IQHE: Tensor, cache: _Cache, plan: _Plan, spec: AttentionSpec) -> Tensor:
    """Queries of a tile see the keys of its row, at most up to their own position."""
    num_tiles, num_queries, _, size = q_IQHE.shape
    kv = spec.num_kv_heads
    keys = cache.keys_BKEP[plan.tables_IM].permute(0, 2, 3, 1, 4).flatten(3)
    values = cache.values_BKPE[plan.tables_IM].permute(0, 2, 1, 3, 4).flatten(2, 3)
    grouped = q_IQHE.view(num_tiles, num_queries, kv, -1, size).transpose(1, 2)
    scores = grouped.flatten(2, 3).float() @ keys.float() * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    positions = torch.arange(keys.shape[-1], device=keys.device)
    distance_IQL = plan.positions_IQ[..., None] - positions
    hidden = distance_IQL < 0
    if spec.window is not None:
        hidden = hidden | (distance_IQL >= spec.window)
    by_query = scores.view(num_tiles, kv, num_queries, -1, scores.shape[-1])
    weights = by_query.masked_fill(hidden[:, None, :, None], float("-inf")).softmax(-1)
    # What nobody has written may be NaN, and that times a weight of 0 is NaN.
    seen = values.float().masked_fill(hidden.all(1)[:, None, :, None], 0.0)
    out = (weights.flatten(2, 3) @ seen).view(grouped.shape)
    return out.transpose(1, 2).reshape(q_IQHE.shape).to(q_IQHE.dtype)
