"""Attention over a cache of slots: (positions of all blocks, keys and values, K, E)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import ITEM_SIZE, IntArray

__all__ = ["SlotAttention"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class _Plan:
    slots_T: Tensor
    rows: list[tuple[slice, int, Tensor]]
    """The tokens of each row, the positions before them, and the slots of all its positions."""


class SlotAttention:
    """One row after the other."""

    name = "acme-slots"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._block_size = 0

    def refuses(self, need: AttentionNeed) -> str | None:
        """What the card's kernel lacks."""
        if need.deterministic:
            return "the card adds in an order of its own"
        if need.features - {"window"}:
            return f"the card has no {', '.join(sorted(need.features - {'window'}))}"
        if need.kv_dtype not in _DTYPES:
            return f"it keeps {', '.join(_DTYPES)}, not {need.kv_dtype}"
        return None

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys and values."""
        per_slot = 2 * spec.num_kv_heads * spec.head_size * ITEM_SIZE[need.kv_dtype]
        return need.block_size * per_slot

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> Tensor:
        """(blocks times positions, 2, K, E)"""
        shape = (num_blocks * need.block_size, 2, spec.num_kv_heads, spec.head_size)
        self._block_size = need.block_size
        return torch.zeros(shape, dtype=_DTYPES[need.kv_dtype], device=self._device)

    def plan(self, batch: Batch, need: AttentionNeed) -> _Plan:
        """Where everything is."""
        size = need.block_size
        tables = torch.from_numpy(batch.block_tables).long()
        slots_RL = (tables[:, :, None] * size + torch.arange(size)).flatten(1)
        starts, contexts = batch.query_starts.tolist(), batch.context_lens.tolist()
        lengths = batch.sequence_lens.tolist()
        rows = [
            (slice(starts[i], starts[i + 1]), contexts[i], slots_RL[i, : lengths[i]])
            for i in range(batch.num_rows)
        ]
        return _Plan(torch.from_numpy(batch.slots(size)).long(), rows)

    def attend(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        cache: Tensor,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor]:
        """Write, then attend; the cache is changed in place."""
        if not isinstance(plan, _Plan):
            raise TypeError(f"a plan of another backend: {type(plan).__name__}")
        cache[plan.slots_T] = torch.stack([k_TKE, v_TKE], 1).to(cache.dtype)
        out_THE = torch.zeros_like(q_THE)
        for tokens, context, slots_L in plan.rows:
            if tokens.stop > tokens.start:
                entries_KLE = cache[slots_L].to(q_THE.dtype).permute(1, 2, 0, 3)
                out_THE[tokens] = _attend(q_THE[tokens], context, entries_KLE, spec)
        return out_THE, cache

    def copy_blocks(self, caches: Sequence[Tensor], pairs: IntArray) -> Sequence[Tensor]:
        """Copy in place, in every layer."""
        source, target = torch.from_numpy(pairs).long().T
        for cache in caches:
            by_block = cache.view(-1, self._block_size, *cache.shape[1:])
            by_block[target] = by_block[source]
        return caches


def _attend(q_THE: Tensor, context: int, entries_KLE: Tensor, spec: AttentionSpec) -> Tensor:
    """The tokens of one row, which come after ``context`` others; entries are (2, K, L, E)."""
    k_HLE, v_HLE = entries_KLE.repeat_interleave(spec.num_heads // spec.num_kv_heads, 1)
    query = torch.arange(context, context + len(q_THE))[:, None]
    distance = query - torch.arange(k_HLE.shape[1])
    seen = distance >= 0
    if spec.window is not None:
        seen &= distance < spec.window
    out_HTE = scaled_dot_product_attention(
        q_THE.transpose(0, 1)[None], k_HLE[None], v_HLE[None], attn_mask=seen, scale=spec.scale
    )
    return out_HTE[0].transpose(0, 1)
