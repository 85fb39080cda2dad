"""Paged attention that gives a token the same bits whatever else is in the step.

Each query token is a small matrix of its own, (query heads of a KV head, E), multiplied with tiles
of keys that begin at fixed positions; so the shapes of all products, and with them the order of
every sum, are the same for a prompt in one piece, in pieces, and for decoding. A tile that a
query does not see adds exact zeros. The largest score is exact in any order, sums within a tile
run over a fixed number of keys, and tiles are added in the order of their positions. All of it in
float32.

A query reads what is in the cache, also of its own step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dovetail.attention_backends.kv_cache import (
    KvCache,
    bytes_per_block,
    leftovers,
    make_cache,
    refuses_kv_dtype,
    tables_within,
)
from dovetail.attention_backends.steady import in_place, least_batch, products
from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import IndexArray, IntArray

__all__ = ["InvariantAttention"]

_TILE = 128
"""Keys whose products are summed by one kernel: more waste short sequences, fewer cost calls."""
_MOST_KEYS = 32768
"""Keys, of all rows together, that are gathered at a time for rows that decode."""
_MOST_SCORES = 1 << 21
"""Scores that are held at a time for a row that prefills."""
_QUERY_CHUNK = 128
"""The most queries of a row at a time: more of them score more keys in vain."""


@dataclass(frozen=True)
class _Decode:
    """Rows of similar length with one query token each."""

    tokens_R: Tensor
    blocks_X: Tensor
    """The rows' KV blocks, all one after another, as many for each row: whole tiles."""
    leftover_X: Tensor
    """Places in their last blocks that are none of their positions."""
    positions_R: Tensor
    num_tiles: int


@dataclass(frozen=True)
class _Prefill:
    """A row with several query tokens."""

    start: int
    count: int
    before: int
    """Tokens that were in the cache before the step."""
    blocks: Tensor
    """Its KV blocks, filled up to whole tiles."""


@dataclass(frozen=True)
class _Plan:
    blocks_T: Tensor
    offsets_T: Tensor
    decodes: list[_Decode]
    prefills: list[_Prefill]


class InvariantAttention:
    """For deterministic mode; serves every model, on devices with float32."""

    name = "invariant"

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def refuses(self, need: AttentionNeed) -> str | None:
        """Serves blocks that fill tiles, where products of matrices are steady."""
        if _TILE % need.block_size:
            return f"its tiles of {_TILE} keys are not whole blocks of {need.block_size}"
        # Only where it matters: finding out takes a tenth of a second, at every start.
        if need.deterministic and any(self._least(spec) is None for spec in need.specs):
            return "the products of matrices here depend on how many are computed at once"
        return refuses_kv_dtype(need)

    def _least(self, spec: AttentionSpec) -> int | None:
        group = spec.num_heads // spec.num_kv_heads
        return least_batch(group, spec.head_size, _TILE, self.device)

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys, values and scales of one block."""
        return bytes_per_block(spec, need)

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> KvCache:
        """See ``kv_cache``."""
        return make_cache(spec, need, num_blocks, self.device)

    def plan(self, batch: Batch, need: AttentionNeed) -> _Plan:
        """Sort the rows into groups that decode together and rows that prefill."""
        num_real, size = batch.num_tokens - batch.num_padding, need.block_size
        blocks, offsets = np.divmod(batch.slots(size)[:num_real], size)
        num_tiles = -(-batch.sequence_lens // _TILE)
        width = int(num_tiles.max()) * _TILE // size
        tables = tables_within(batch, np.arange(batch.num_rows), width, size)
        prefill = np.flatnonzero(batch.query_lens > 1)
        per_tile = _TILE // size
        return _Plan(
            blocks_T=self._tensor(blocks),
            offsets_T=self._tensor(offsets),
            decodes=list(self._plan_decodes(batch, tables, num_tiles, size)),
            prefills=[
                _Prefill(
                    start=int(batch.query_starts[i]),
                    count=int(batch.query_lens[i]),
                    before=int(batch.context_lens[i]),
                    blocks=self._tensor(tables[i, : int(num_tiles[i]) * per_tile]),
                )
                for i in prefill.tolist()
            ],
        )

    def _tensor(self, array: IntArray | IndexArray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array, np.int64)).to(self.device)

    def _plan_decodes(
        self, batch: Batch, tables: IntArray, num_tiles: IntArray, block_size: int
    ) -> Iterator[_Decode]:
        """Groups whose longest row has less than twice the tiles of the shortest."""
        rows = np.flatnonzero(batch.query_lens == 1)
        buckets = np.frexp(num_tiles[rows] - 0.5)[1]
        for bucket in np.unique(buckets):
            members = rows[buckets == bucket]
            width = int(num_tiles[members].max())
            most = max(1, _MOST_KEYS // (width * _TILE))
            for part in np.split(members, range(most, len(members), most)):
                yield _Decode(
                    tokens_R=self._tensor(batch.query_starts[part]),
                    blocks_X=self._tensor(tables[part, : width * _TILE // block_size].ravel()),
                    leftover_X=self._tensor(leftovers(batch, part, width * _TILE, block_size)),
                    positions_R=self._tensor(batch.context_lens[part]),
                    num_tiles=width,
                )

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
        cache.write(k_TKE[:num_real], v_TKE[:num_real], plan.blocks_T, plan.offsets_T)
        scaled = (q_THE.float() * spec.scale).view(
            len(q_THE), spec.num_kv_heads, -1, q_THE.shape[2]
        )
        q_KTGE = scaled.transpose(0, 1).contiguous()
        out_KTGE = torch.empty_like(q_KTGE)
        least = self._least(spec) or 1
        for decode in plan.decodes:
            kv = cache.gather(decode.blocks_X, torch.float32)
            kv.index_fill_(2, decode.leftover_X, 0.0)
            own = _OwnKeys(kv, decode.num_tiles, least)
            out_KTGE[:, decode.tokens_R] = _attend(
                q_KTGE[:, decode.tokens_R], own, decode.positions_R, 0, spec
            )
        for row in plan.prefills:
            tokens = slice(row.start, row.start + row.count)
            kv = cache.gather(row.blocks, torch.float32)
            kv[:, :, row.before + row.count :] = 0.0
            out_KTGE[:, tokens] = self._prefill(q_KTGE[:, tokens], kv, row, least, spec)
        return out_KTGE.transpose(0, 1).flatten(1, 2).to(q_THE.dtype), cache

    def _prefill(
        self,
        q_KTGE: Tensor,
        kv: Tensor,
        row: _Prefill,
        least: int,
        spec: AttentionSpec,
    ) -> Tensor:
        """Several query tokens of one row; ``kv`` is (2, K, L, E)."""
        most = max(1, _MOST_SCORES // (spec.num_heads * kv.shape[2]))
        size = min(_QUERY_CHUNK, most)
        parts = []
        for start in range(0, row.count, size):
            end = min(start + size, row.count)
            positions = torch.arange(row.before + start, row.before + end, device=self.device)
            first = 0
            if spec.window is not None:
                first = max(0, row.before + start - spec.window + 1) // _TILE
            seen = slice(first * _TILE, -(-(row.before + end) // _TILE) * _TILE)
            shared = _SharedKeys(kv[:, :, seen], least)
            parts.append(_attend(q_KTGE[:, start:end], shared, positions, first, spec))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def copy_blocks(self, caches: Sequence[KvCache], pairs: IntArray) -> Sequence[KvCache]:
        """Copy in place, in every layer."""
        source, target = self._tensor(pairs[:, 0]), self._tensor(pairs[:, 1])
        for cache in caches:
            cache.copy(source, target)
        return caches


class _Keys(Protocol):
    """Tiles of keys and values, and the queries' products with them. N query tokens, I tiles."""

    num_tiles: int

    def scores(self, q_KNGE: Tensor) -> Tensor:
        """(I, K, N, G, tile)"""
        ...

    def mixed(self, weights_IKNGL: Tensor) -> Iterator[Tensor]:
        """Of each tile, the values by their weights: (K, N, G, E)."""
        ...


class _OwnKeys:
    """Each query token has a sequence of its own; ``kv`` is (2, K, N * I * tile, E)."""

    def __init__(self, kv: Tensor, num_tiles: int, least: int) -> None:
        self.num_tiles = num_tiles
        self._least = least
        self._keys, self._values = kv.view(2, -1, num_tiles, _TILE, kv.shape[-1])

    def scores(self, q_KNGE: Tensor) -> Tensor:
        """See ``_Keys``."""
        out = q_KNGE.new_empty(self.num_tiles, *q_KNGE.shape[:-1], _TILE)
        for i in range(self.num_tiles):
            keys = self._keys[:, i].transpose(1, 2)
            products(q_KNGE.flatten(0, 1), keys, self._least, out[i].flatten(0, 1))
        return out

    def mixed(self, weights_IKNGL: Tensor) -> Iterator[Tensor]:
        """See ``_Keys``."""
        size = self._values.shape[-1]
        for i, weights in enumerate(weights_IKNGL):
            out = weights.new_empty(*weights.shape[:-1], size)
            products(weights.flatten(0, 1), self._values[:, i], self._least, out.flatten(0, 1))
            yield out


class _SharedKeys:
    """All query tokens are of one sequence; ``kv`` is (2, K, I * tile, E)."""

    def __init__(self, kv: Tensor, least: int) -> None:
        self._least = least
        self._keys, self._values = kv.view(2, kv.shape[1], -1, _TILE, kv.shape[-1])
        self.num_tiles = self._keys.shape[1]

    def scores(self, q_KNGE: Tensor) -> Tensor:
        """See ``_Keys``."""
        out = q_KNGE.new_empty(self.num_tiles, *q_KNGE.shape[:-1], _TILE)
        for k, q_NGE in enumerate(q_KNGE):
            for i in range(self.num_tiles):
                keys = self._keys[k, i].T.expand(len(q_NGE), -1, -1)
                products(q_NGE, keys, self._least, out[i, k])
        return out

    def mixed(self, weights_IKNGL: Tensor) -> Iterator[Tensor]:
        """See ``_Keys``."""
        size = self._values.shape[-1]
        for i, weights in enumerate(weights_IKNGL):
            out = weights.new_empty(*weights.shape[:-1], size)
            for k, w_NGL in enumerate(weights):
                values = self._values[k, i].expand(len(w_NGL), -1, -1)
                products(w_NGL, values, self._least, out[k])
            yield out


def _attend(
    q_KNGE: Tensor, keys: _Keys, positions_N: Tensor, first_tile: int, spec: AttentionSpec
) -> Tensor:
    """Attention of N query tokens, already scaled; float32, (K, N, G, E) in and out.

    Args:
        q_KNGE: Contiguous.
        keys: Tiles from ``first_tile`` on.
        positions_N: Of the queries.
        first_tile: Nobody sees an earlier one.
        spec: Of the layer.
    """
    scores = keys.scores(q_KNGE)
    if spec.soft_cap is not None:
        in_place(torch.tanh_, scores.div_(spec.soft_cap))
        scores.mul_(spec.soft_cap)
    _hide(scores, positions_N, first_tile, spec)
    peak_KNG = scores.amax(-1).amax(0)
    in_place(torch.exp_, scores.sub_(peak_KNG[..., None]))
    out = torch.zeros_like(q_KNGE)
    total_KNG = torch.zeros_like(peak_KNG)
    for part_KNG in scores.sum(-1):
        total_KNG += part_KNG
    for part_KNGE in keys.mixed(scores):
        out += part_KNGE
    return out.div_(total_KNG[..., None])


def _hide(scores_IKNGL: Tensor, query_N: Tensor, first_tile: int, spec: AttentionSpec) -> None:
    """Minus infinity where a query must not look; ALiBi's slopes elsewhere. In place."""
    num_tiles, num_kv = scores_IKNGL.shape[:2]
    keys_IL = torch.arange(num_tiles * _TILE, device=query_N.device).view(num_tiles, _TILE)
    distance_INL = query_N[None, :, None] - (keys_IL + first_tile * _TILE)[:, None]
    if spec.alibi_slopes is not None:
        slopes = torch.tensor(spec.alibi_slopes, device=query_N.device).view(1, num_kv, 1, -1, 1)
        scores_IKNGL -= slopes * distance_INL[:, None, :, None]
    hidden = distance_INL < 0
    if spec.window is not None:
        hidden |= distance_INL >= spec.window
    scores_IKNGL.masked_fill_(hidden[:, None, :, None], float("-inf"))
