"""Paged attention in plain jnp: what the Pallas kernels are compared with, and what the CPU runs.

A cache is (2, B, P, K, E): keys, then values. A decode step gathers every row's keys and attends to
them at once. Any other step goes row by row, in tiles of a few queries of one row each.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import IntArray
from dovetail_tpu.ops import exact

__all__ = ["XlaAttention"]

_TILE = 16
"""Queries of one row that attend together in a step that is not decode."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _Plan:
    tables_RM: Any
    slots_T: Any
    positions_T: Any
    tiles: Any
    """(N, 4): row, first token, its position, tokens. Without tokens: there is no such tile."""
    num_tiles: Any
    """Tiles that there are; none in a decode step."""


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
        tiles, num_tiles = np.zeros((0, 4), np.int32), 0
        if batch.num_tokens != batch.num_rows:
            tiles, num_tiles = _tiles(batch)
        return _Plan(
            batch.block_tables,
            batch.slots(need.block_size).astype(np.int32),
            batch.positions.astype(np.int32),
            tiles,
            np.array(num_tiles, np.int32),
        )

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
        attended: tuple[Array, Array] = _write_and_attend(q_THE, k_TKE, v_TKE, cache, plan, spec)
        return attended

    def copy_blocks(self, caches: Sequence[Array], pairs: IntArray) -> Sequence[Array]:
        """New caches, as ``attend`` does."""
        return [cache.at[:, pairs[:, 1]].set(cache[:, pairs[:, 0]]) for cache in caches]


@functools.partial(jax.jit, static_argnames="spec", inline=True)
def _write_and_attend(
    q_THE: Array, k_TKE: Array, v_TKE: Array, cache: Array, plan: _Plan, spec: AttentionSpec
) -> tuple[Array, Array]:
    block_size, positions = cache.shape[2], plan.positions_T
    blocks, offsets = plan.slots_T // block_size, plan.slots_T % block_size
    cache = cache.at[:, blocks, offsets].set(jnp.stack([k_TKE, v_TKE]).astype(cache.dtype))
    if len(plan.tiles):
        return _attend_tiles(q_THE, cache, plan, spec), cache
    k, v = _gather(cache, plan.tables_RM, _first_seen(positions, spec), positions)
    return _attend(q_THE[:, None], k, v, positions[:, None], spec)[:, 0], cache


def _tiles(batch: Batch) -> tuple[IntArray, int]:
    """Each row cut into tiles, in order of token, and how many they are; padded to a fixed size."""
    real = batch.num_tokens - batch.num_padding
    counts = -(-batch.query_lens // _TILE)
    rows = np.arange(batch.num_rows, dtype=np.int32).repeat(counts)
    within = np.arange(len(rows), dtype=np.int32) - (np.cumsum(counts) - counts).repeat(counts)
    first = batch.query_starts[:-1][rows] + within * _TILE
    count = np.minimum(_TILE, batch.query_starts[1:][rows] - first)
    position = batch.positions[:real][first]
    tiles = np.zeros((batch.num_rows + batch.num_tokens // _TILE, 4), np.int32)
    tiles[: len(rows)] = np.stack((rows, first, position, count), 1)
    return tiles, len(rows)


def _attend_tiles(q_THE: Array, cache: Array, plan: _Plan, spec: AttentionSpec) -> Array:
    """Tile after tile: what one writes beyond its row, the next one of them writes over."""
    num_tokens = q_THE.shape[0]
    queries = jnp.pad(q_THE, ((0, _TILE), (0, 0), (0, 0)))

    def attend(i: Array, out: Array) -> Array:
        row, start, position, count = plan.tiles[i]
        q = lax.dynamic_slice_in_dim(queries, start, _TILE)[None]
        last = position + count - 1
        positions = jnp.minimum(position + jnp.arange(_TILE, dtype=jnp.int32), last)
        first = _first_seen(positions[:1], spec)
        k, v = _gather(cache, plan.tables_RM[row][None], first, last[None])
        attended = _attend(q, k, v, positions[None], spec)[0]
        return lax.dynamic_update_slice_in_dim(out, attended, start, 0)

    out: Array = lax.fori_loop(0, plan.num_tiles, attend, jnp.zeros_like(queries))
    return out[:num_tokens]


def _first_seen(positions: Array, spec: AttentionSpec) -> Array:
    """The first position that is seen from each of some."""
    if spec.window is None:
        return jnp.zeros_like(positions)
    return jnp.maximum(positions - spec.window + 1, 0)


def _gather(cache: Array, tables_RM: Array, first_R: Array, last_R: Array) -> tuple[Array, Array]:
    """Keys and values (R, L, K, E) of rows; values outside first..last, which may be NaN, are 0."""
    k, v = cache[:, tables_RM]
    k, v = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in (k, v))
    at = jnp.arange(v.shape[1], dtype=jnp.int32)[None]
    real = (at >= first_R[:, None]) & (at <= last_R[:, None])
    return k, jnp.where(real[..., None, None], v, 0)


def _attend(
    q_RQHE: Array, k_RLKE: Array, v_RLKE: Array, positions_RQ: Array, spec: AttentionSpec
) -> Array:
    """(R, Q, H, E): Q queries of each row over its L keys, in float32."""
    rows, count, heads, size = q_RQHE.shape
    dtype = q_RQHE.dtype
    q = q_RQHE.reshape(rows, count, k_RLKE.shape[2], -1, size).astype(jnp.float32)
    k, v = k_RLKE.astype(jnp.float32), v_RLKE.astype(jnp.float32)
    scores = jnp.einsum("rqkge,rlke->rkgql", q, k, precision=exact(q)) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
    distance = positions_RQ[:, :, None] - jnp.arange(k.shape[1], dtype=jnp.int32)
    seen = distance >= 0
    if spec.window is not None:
        seen &= distance < spec.window
    scores = jnp.where(seen[:, None, None], scores, -jnp.inf)
    out = jnp.einsum("rkgql,rlke->rqkge", jax.nn.softmax(scores, -1), v, precision=exact(q))
    return out.reshape(rows, count, heads, size).astype(dtype)
