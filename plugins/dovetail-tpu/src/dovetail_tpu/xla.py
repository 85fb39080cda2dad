"""Paged attention in plain jnp: what the Pallas kernels are compared with, and what the CPU runs.

A cache is (2, B, P, K, E): keys, then values. A decode step gathers every row's keys and attends to
them at once. Any other step goes row by row, in tiles of a few queries of one row each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dovetail.core.batch import Batch
from dovetail.core.buckets import padded
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import IntArray
from dovetail_tpu.ops import exact

__all__ = ["XlaAttention"]

_TILE = 16
"""Queries of one row that attend together in a step that is not decode."""


class _Plan(NamedTuple):
    tables_RM: Any
    slots_T: Any
    positions_T: Any
    tiles: Any
    """(N, 3): row, first token, end of the row's tokens. All 0: there is no such tile."""


class XlaAttention:
    """Serves everything but ALiBi and cache dtypes that are coded, on any device."""

    name = "xla"
    heads_axis = 3
    """The axis of a cache that counts KV heads."""

    def __init__(self, interpret: bool) -> None:
        """There is no kernel that could be interpreted: ``interpret`` changes nothing."""

    def refuses(self, need: AttentionNeed) -> str | None:
        """What it lacks."""
        if "alibi" in need.features:
            return "it has no ALiBi"
        if need.kv_dtype not in ("float32", "bfloat16"):
            return f"it keeps no {need.kv_dtype} cache, only float32 and bfloat16"
        return "its sums depend on the shape of the step" if need.deterministic else None

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys and values."""
        entries = 2 * need.block_size * spec.num_kv_heads * spec.head_size
        return entries * jnp.dtype(need.kv_dtype).itemsize

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> Array:
        """Zeros, (2, B, P, K, E)."""
        shape = (2, num_blocks, need.block_size, spec.num_kv_heads, spec.head_size)
        return jnp.zeros(shape, need.kv_dtype)

    def plan(self, batch: Batch, need: AttentionNeed) -> _Plan:
        """Where keys and values go, and, unless token i is row i, the tiles of queries."""
        return _Plan(
            batch.block_tables,
            batch.slots(need.block_size).astype(np.int32),
            batch.positions.astype(np.int32),
            np.zeros((0, 3), np.int32) if batch.num_tokens == batch.num_rows else _tiles(batch),
        )

    @functools.partial(jax.jit, static_argnames=("self", "spec"), inline=True)
    def attend(
        self,
        q_THE: Array,
        k_TKE: Array,
        v_TKE: Array,
        cache: Array,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Array, Array]:
        """Write, then attend. A new cache, which takes the old one's memory if that was donated."""
        if not isinstance(plan, _Plan):
            raise TypeError(f"a plan of another backend: {type(plan).__name__}")
        blocks, offsets = jnp.divmod(plan.slots_T, cache.shape[2])
        cache = cache.at[:, blocks, offsets].set(jnp.stack([k_TKE, v_TKE]).astype(cache.dtype))
        if len(plan.tiles):
            return _attend_tiles(q_THE, cache, plan, spec), cache
        positions_R1 = plan.positions_T[:, None]
        return _attend(q_THE[:, None], cache, plan.tables_RM, positions_R1, spec)[:, 0], cache

    def copy_blocks(self, caches: Sequence[Array], pairs: IntArray) -> Sequence[Array]:
        """New caches, as ``attend`` does."""
        return [cache.at[:, pairs[:, 1]].set(cache[:, pairs[:, 0]]) for cache in caches]


def _tiles(batch: Batch) -> IntArray:
    """Each row cut into tiles, in order of token; padded to a fixed number."""
    tiles = [
        (row, start, end)
        for row, (first, end) in enumerate(pairwise(batch.query_starts.tolist()))
        for start in range(first, end, _TILE)
    ]
    return padded(np.array(tiles, np.int32), batch.num_rows + batch.num_tokens // _TILE)


def _attend_tiles(q_THE: Array, cache: Array, plan: _Plan, spec: AttentionSpec) -> Array:
    """Tile after tile: what one writes beyond its row, the next one of them writes over."""

    def attend(i: Array, out: Array) -> Array:
        row, start, end = plan.tiles[i]
        tokens = jnp.minimum(start + jnp.arange(_TILE, dtype=jnp.int32), end - 1)
        table, positions = plan.tables_RM[row], plan.positions_T[tokens]
        attended = _attend(q_THE[tokens][None], cache, table[None], positions[None], spec)
        return lax.dynamic_update_slice_in_dim(out, attended[0], start, 0)

    num_tiles = jnp.sum(plan.tiles[:, 2] > 0, dtype=jnp.int32)
    room = jnp.zeros_like(q_THE, shape=(len(q_THE) + _TILE, *q_THE.shape[1:]))
    out: Array = lax.fori_loop(0, num_tiles, attend, room)
    return out[: len(q_THE)]


def _attend(
    q_RQHE: Array, cache: Array, tables_RM: Array, positions_RQ: Array, spec: AttentionSpec
) -> Array:
    """(R, Q, H, E): Q queries of each row over all keys in the row's blocks, in float32.

    Values that no query sees may be NaN.
    """
    (rows, count, _, size), num_kv_heads = q_RQHE.shape, cache.shape[3]
    q = q_RQHE.reshape(rows, count, num_kv_heads, -1, size).astype(jnp.float32)
    k, v = cache[:, tables_RM].reshape(2, rows, -1, num_kv_heads, size).astype(jnp.float32)
    distance = positions_RQ[:, :, None] - jnp.arange(k.shape[1], dtype=jnp.int32)
    seen = distance >= 0
    if spec.window is not None:
        seen &= distance < spec.window
    v = jnp.where(seen.any(1)[..., None, None], v, 0)
    scores = jnp.einsum("rqkge,rlke->rkgql", q, k, precision=exact(q)) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    out = jnp.einsum("rkgql,rlke->rqkge", jax.nn.softmax(scores, -1), v, precision=exact(q))
    return out.reshape(q_RQHE.shape).astype(q_RQHE.dtype)
