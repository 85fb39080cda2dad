"""Paged attention through torch's scaled_dot_product_attention, in a layout that suits CPUs.

The cache of a layer is (2, K, B, P, E) (``kv_cache``): gathering the blocks of a row gives each KV
head a contiguous run of positions, so nothing is transposed or copied twice. Rows that decode, or
check a few drafts, are attended together, with the query heads of a KV head as the query axis, so
that each key is read once for the whole group; rows that prefill are attended one by one, in chunks
of queries that look at no later key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dovetail.attention_backends.kv_cache import (
    KvCache,
    bytes_per_block,
    leftovers,
    make_cache,
    refuses_kv_dtype,
    tables_within,
)
from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import IndexArray, IntArray

__all__ = ["SdpaAttention"]

_QUERY_CHUNK = 128
"""Queries attended together: more of them score more keys in vain, fewer cost more calls."""
_FEW_QUERIES = 16
"""Rows with so many query tokens behind a cached beginning are attended with others like them."""


@dataclass(frozen=True)
class _Decode:
    """R rows of similar length with Q query tokens each: one, or a few more with drafts."""

    tokens_X: Tensor | None
    """Index of the rows' tokens among the T, row by row; None: the step is this one group."""
    blocks_X: Tensor
    """The rows' KV blocks, all one after another, as many for each row."""
    leftover_X: Tensor
    """Gathered places in the rows' last blocks that are none of their positions."""
    positions_RQ: Tensor
    keys_L: Tensor
    """Position of each gathered key."""


@dataclass(frozen=True)
class _Prefill:
    """One row with several query tokens."""

    start: int
    count: int
    length: int
    blocks: Tensor | None
    """Its KV blocks; None: all its keys are in this step, and stored as they are."""


@dataclass(frozen=True)
class _Plan:
    blocks_T: Tensor
    offsets_T: Tensor
    """Where each token's key and value go, if it is a row's: its KV block, and the place in it."""
    places: list[tuple[int, int]]
    """The same on the host, if there is one token; else empty."""
    decodes: list[_Decode]
    prefills: list[_Prefill]
    biases: dict[tuple[int, int | None, int], Tensor]
    """Masks by (index of the group, window, heads per KV head): layers alike share them."""


class SdpaAttention:
    """Fast on CPUs without a compiled extension; any torch device can run it."""

    name = "sdpa"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def refuses(self, need: AttentionNeed) -> str | None:
        """Serves everything but ALiBi and deterministic mode."""
        if need.deterministic:
            return "its kernels are chosen by the number of rows and keys in a step"
        if "alibi" in need.features:
            return "ALiBi needs a bias per head, which this backend does not build"
        return refuses_kv_dtype(need)

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys, values and scales of one block."""
        return bytes_per_block(spec, need)

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> KvCache:
        """See ``kv_cache``."""
        return make_cache(spec, need, num_blocks, self.device)

    def plan(self, batch: Batch, need: AttentionNeed) -> _Plan:
        """Sort the rows into groups that decode together and rows that prefill."""
        num_real = batch.num_tokens - batch.num_padding
        blocks, offsets = np.divmod(batch.slots(need.block_size)[:num_real], need.block_size)
        few = (batch.query_lens <= _FEW_QUERIES) & (batch.context_lens > 0)
        together = (batch.query_lens == 1) | few
        alone = np.flatnonzero(~together & (batch.query_lens > 0))
        return _Plan(
            blocks_T=self._tensor(blocks),
            offsets_T=self._tensor(offsets),
            places=[(int(blocks[0]), int(offsets[0]))] if len(blocks) == 1 else [],
            decodes=self._plan_decodes(batch, np.flatnonzero(together), need.block_size),
            prefills=[self._plan_prefill(batch, i, need) for i in alone.tolist()],
            biases={},
        )

    def _tensor(self, array: IntArray | IndexArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.device)

    def _plan_decodes(self, batch: Batch, rows: IndexArray, size: int) -> list[_Decode]:
        """Groups of equally many queries, of rows whose lengths differ by less than twice."""
        if not len(rows):
            return []
        num_blocks = -(-batch.sequence_lens[rows] // size)
        bucket = np.frexp(num_blocks - 1)[1] if num_blocks.max() > 1 else np.zeros_like(num_blocks)
        kinds, kind = np.unique(
            np.stack([batch.query_lens[rows], bucket]), axis=1, return_inverse=True
        )
        groups = []
        for number, count in enumerate(kinds[0].tolist()):
            mine = kind.ravel() == number
            members, width = rows[mine], int(num_blocks[mine].max())
            queries = np.arange(count)
            tokens = batch.query_starts[members][:, None] + queries
            positions = batch.context_lens[members][:, None] + queries
            whole = len(members) == batch.num_rows and not batch.num_padding
            groups.append(
                _Decode(
                    tokens_X=None if whole else self._tensor(tokens.ravel()),
                    blocks_X=self._tensor(tables_within(batch, members, width, size).ravel()),
                    leftover_X=self._tensor(leftovers(batch, members, width * size, size)),
                    positions_RQ=self._tensor(positions),
                    keys_L=torch.arange(width * size, device=self.device),
                )
            )
        return groups

    def _plan_prefill(self, batch: Batch, i: int, need: AttentionNeed) -> _Prefill:
        length, size = int(batch.sequence_lens[i]), need.block_size
        fresh = batch.context_lens[i] == 0 and need.kv_dtype == need.dtype
        blocks = None if fresh else self._tensor(batch.block_tables[i, : -(-length // size)])
        return _Prefill(int(batch.query_starts[i]), int(batch.query_lens[i]), length, blocks)

    def attend(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        cache: KvCache,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Tensor, KvCache]:
        """Write, then attend. The cache is changed in place."""
        if not isinstance(plan, _Plan):
            raise TypeError(f"a plan of another backend: {type(plan).__name__}")
        num_real = len(plan.blocks_T)
        if len(plan.places) == 1:
            cache.write_one(k_TKE[:1], v_TKE[:1], *plan.places[0])
        else:
            cache.write(k_TKE[:num_real], v_TKE[:num_real], plan.blocks_T, plan.offsets_T)
        if len(plan.decodes) == 1 and plan.decodes[0].tokens_X is None:
            return self._decode(q_THE, cache, plan, 0, spec), cache
        out_THE = torch.zeros_like(q_THE)  # tokens of no row must stay finite
        for index, decode in enumerate(plan.decodes):
            if decode.tokens_X is not None:
                q_XHE = q_THE[decode.tokens_X]
                out_THE[decode.tokens_X] = self._decode(q_XHE, cache, plan, index, spec)
        for row in plan.prefills:
            tokens = slice(row.start, row.start + row.count)
            fresh = (k_TKE[tokens], v_TKE[tokens])
            out_THE[tokens] = self._prefill(q_THE[tokens], fresh, cache, row, spec)
        return out_THE, cache

    def _decode(
        self, q_XHE: Tensor, cache: KvCache, plan: _Plan, index: int, spec: AttentionSpec
    ) -> Tensor:
        """The query tokens of one group, row by row: (R * Q, H, E) in and out."""
        group = plan.decodes[index]
        num_rows, num_queries = group.positions_RQ.shape
        kv, size = spec.num_kv_heads, spec.head_size
        gathered = cache.gather(group.blocks_X, q_XHE.dtype).index_fill_(2, group.leftover_X, 0.0)
        keys, values = gathered.view(2, kv, num_rows, -1, size)
        heads = spec.num_heads // kv
        by_row = q_XHE.view(num_rows, num_queries, kv, heads, size).permute(2, 0, 1, 3, 4)
        query = by_row.reshape(kv, num_rows, num_queries * heads, size)
        bias = _bias(plan, index, spec, q_XHE.dtype)
        out = _dense_attention(query, keys, values, bias, spec)
        by_token = out.view(kv, num_rows, num_queries, heads, size).permute(1, 2, 0, 3, 4)
        return by_token.reshape(q_XHE.shape)

    def _prefill(
        self,
        q_THE: Tensor,
        fresh: tuple[Tensor, Tensor],
        cache: KvCache,
        row: _Prefill,
        spec: AttentionSpec,
    ) -> Tensor:
        """Several query tokens of one row: (T, H, E) in and out; ``fresh`` are their (T, K, E)."""
        kv, size = spec.num_kv_heads, spec.head_size
        if row.blocks is None:
            keys_KLE, values_KLE = (x.transpose(0, 1) for x in fresh)
        else:
            keys_KLE, values_KLE = cache.gather(row.blocks, q_THE.dtype)[:, :, : row.length]
        query = q_THE.view(row.count, kv, -1, size).permute(1, 2, 0, 3)
        out = torch.empty_like(q_THE).view(row.count, kv, -1, size).permute(1, 2, 0, 3)
        before = row.length - row.count
        for start in range(0, row.count, _QUERY_CHUNK):
            end = min(start + _QUERY_CHUNK, row.count)
            first = 0 if spec.window is None else max(0, before + start - spec.window + 1)
            seen = slice(first, before + end)
            out[:, :, start:end] = _attend_chunk(
                query[:, :, start:end], keys_KLE[:, seen], values_KLE[:, seen], spec
            )
        return out.permute(2, 0, 1, 3).reshape(row.count, spec.num_heads, size)

    def copy_blocks(self, caches: Sequence[KvCache], pairs: IntArray) -> Sequence[KvCache]:
        """Copy in place, in every layer."""
        source, target = self._tensor(pairs[:, 0]), self._tensor(pairs[:, 1])
        for cache in caches:
            cache.copy(source, target)
        return caches


def _attend_chunk(q_KGTE: Tensor, k_KLE: Tensor, v_KLE: Tensor, spec: AttentionSpec) -> Tensor:
    """The last T of L positions attend, as two matrix products around a softmax.

    The query heads of a KV head are rows of one matrix. Scores have the dtype of the queries, as
    in eager attention.
    """
    kv, group, count, size = q_KGTE.shape
    length = k_KLE.shape[1]
    rows = q_KGTE.reshape(kv, group * count, size)
    start = rows.new_zeros(())
    scores = torch.baddbmm(start, rows, k_KLE.transpose(1, 2), beta=0, alpha=spec.scale)
    if spec.soft_cap is not None:
        capped = spec.soft_cap * torch.tanh(scores.float() / spec.soft_cap)
        scores = capped.to(scores.dtype)
    by_query = scores.view(kv, group, count, length)
    ahead = torch.ones(count, count, dtype=torch.bool, device=rows.device).triu_(1)
    by_query[..., length - count :].masked_fill_(ahead, float("-inf"))
    if spec.window is not None and length > spec.window:
        distance = torch.arange(length - count, length)[:, None] - torch.arange(length)
        by_query.masked_fill_((distance >= spec.window).to(rows.device), float("-inf"))
    return torch.bmm(scores.softmax(-1), v_KLE).view(kv, group, count, size)


def _bias(plan: _Plan, index: int, spec: AttentionSpec, dtype: torch.dtype) -> Tensor:
    """0 where a query may look and minus infinity elsewhere; made once per step and window.

    (1, R, Q * heads, L), where heads are those of a KV head; for Q = 1 they share a row.
    """
    group, heads = plan.decodes[index], spec.num_heads // spec.num_kv_heads
    known = plan.biases.get((index, spec.window, heads))
    if known is not None:
        return known
    query, key = group.positions_RQ[:, :, None], group.keys_L
    hidden = key > query
    if spec.window is not None:
        hidden |= key <= query - spec.window
    bias = torch.zeros(hidden.shape, dtype=dtype, device=query.device)
    bias.masked_fill_(hidden, float("-inf"))
    if bias.shape[1] > 1:
        bias = bias.repeat_interleave(heads, dim=1)
    plan.biases[index, spec.window, heads] = bias[None]
    return bias[None]


def _dense_attention(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, spec: AttentionSpec
) -> Tensor:
    """Attention over gathered keys, with or without a soft cap."""
    if spec.soft_cap is None:
        return functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=bias, scale=spec.scale
        )
    scores = (query @ keys.transpose(-1, -2)).float() * spec.scale
    scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap) + bias
    return scores.softmax(-1).to(values.dtype) @ values
