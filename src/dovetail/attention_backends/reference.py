"""Paged attention to read and to compare with: one row at a time, in float32, no tricks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.attention_backends.kv_cache import (
    KvCache,
    bytes_per_block,
    make_cache,
    refuses_kv_dtype,
)
from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import IntArray

__all__ = ["ReferenceAttention", "attention_bias"]


@dataclass(frozen=True)
class _Plan:
    blocks_T: Tensor
    offsets_T: Tensor
    rows: list[tuple[int, int, int, Tensor]]
    """First token, number of tokens, length of the sequence, and KV blocks of each row."""


def attention_bias(spec: AttentionSpec, query_T: Tensor, key_L: Tensor) -> Tensor:
    """What is added to the scores of queries at positions ``query_T`` for keys at ``key_L``.

    Minus infinity where a query must not look: later positions, and those outside the window.

    Returns:
        float32, (T, L), or (H, T, L) where the layer has ALiBi slopes (Press et al., 2022).
    """
    distance = query_T[:, None] - key_L[None, :]
    hidden = distance < 0
    if spec.window is not None:
        hidden |= distance >= spec.window
    bias = torch.zeros(distance.shape, device=distance.device).masked_fill_(hidden, float("-inf"))
    if spec.alibi_slopes is None:
        return bias
    slopes_H = torch.tensor(spec.alibi_slopes, device=distance.device)
    return bias - slopes_H[:, None, None] * distance.clamp(min=0)


class ReferenceAttention:
    """The oracle: serves everything but deterministic mode, slowly."""

    name = "reference"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def refuses(self, need: AttentionNeed) -> str | None:
        """Serves everything but deterministic mode."""
        if need.deterministic:
            return "its sums run over as many keys as a step happens to have"
        return refuses_kv_dtype(need)

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys, values and scales of one block."""
        return bytes_per_block(spec, need)

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> KvCache:
        """See ``kv_cache``."""
        return make_cache(spec, need, num_blocks, self.device)

    def plan(self, batch: Batch, need: AttentionNeed) -> _Plan:
        """Where keys and values go, and the blocks of each row."""
        slots = torch.from_numpy(batch.slots(need.block_size)).long().to(self.device)
        size = need.block_size
        tables = torch.from_numpy(batch.block_tables).long().to(self.device)
        starts, lens = batch.query_starts.tolist(), batch.sequence_lens.tolist()
        rows = [
            (
                starts[i],
                starts[i + 1] - starts[i],
                length,
                tables[i, : -(-length // size)],
            )
            for i, length in enumerate(lens)
        ]
        return _Plan(slots // size, slots % size, rows)

    def attend(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        cache: KvCache,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Tensor, KvCache]:
        """Write, then attend row by row. The cache is changed in place."""
        if not isinstance(plan, _Plan):
            raise TypeError(f"a plan of another backend: {type(plan).__name__}")
        cache.write(k_TKE, v_TKE, plan.blocks_T, plan.offsets_T)
        out_THE = torch.zeros_like(q_THE)  # tokens of no row must stay finite
        for start, count, length, blocks in plan.rows:
            k_LKE, v_LKE = cache.gather(blocks, torch.float32)[:, :, :length].transpose(1, 2)
            query = q_THE[start : start + count].float()
            out_THE[start : start + count] = _attend_row(query, k_LKE, v_LKE, spec)
        return out_THE, cache

    def copy_blocks(self, caches: Sequence[KvCache], pairs: IntArray) -> Sequence[KvCache]:
        """Copy in place, in every layer."""
        source, target = torch.from_numpy(pairs).long().to(self.device).T
        for cache in caches:
            cache.copy(source, target)
        return caches


def _attend_row(q_THE: Tensor, k_LKE: Tensor, v_LKE: Tensor, spec: AttentionSpec) -> Tensor:
    """The last T of L positions attend to all of them; float32 in and out."""
    num_queries, length = len(q_THE), len(k_LKE)
    group = spec.num_heads // spec.num_kv_heads
    k_LHE, v_LHE = k_LKE.repeat_interleave(group, 1), v_LKE.repeat_interleave(group, 1)
    scores_HTL = torch.einsum("the,lhe->htl", q_THE, k_LHE) * spec.scale
    if spec.soft_cap is not None:
        scores_HTL = spec.soft_cap * torch.tanh(scores_HTL / spec.soft_cap)
    keys = torch.arange(length, device=q_THE.device)
    bias = attention_bias(spec, keys[length - num_queries :], keys)
    return torch.einsum("htl,lhe->the", (scores_HTL + bias).softmax(-1), v_LHE)
