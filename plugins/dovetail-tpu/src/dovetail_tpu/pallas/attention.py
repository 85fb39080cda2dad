"""Paged attention for TPU as an attention backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import ITEM_SIZE, IntArray
from dovetail_tpu.pallas.kernels import Interpret, attend, write
from dovetail_tpu.pallas.lanes import Lanes
from dovetail_tpu.pallas.plan import Plan, Tiles, Work, make_plan

__all__ = ["PallasAttention"]

_SUBLANES = {"float32": 8, "bfloat16": 16}
"""Positions in a tile of memory, by dtype."""
_QUERIES, _QUERY_BYTES = 128, 2 << 20
"""A tile of queries: of a KV head, and bytes of all heads in float32."""
_KEYS, _BLOCKS, _KEY_BYTES = 256, 8, 4 << 20
"""A tile of keys: positions, blocks (each is fetched on its own), and bytes of all heads."""


class PallasAttention:
    """Kernels for every TPU from v5 on. Elsewhere they are interpreted, slowly.

    A cache is (B, K, P, W), in which a head's positions make whole tiles of memory.

    Args:
        interpret: Compute with ordinary operations, on any device; with parameters, as a TPU does
            it, copies and all.
    """

    name = "pallas"
    heads_axis = 1
    """The axis of a cache that counts KV heads."""

    def __init__(self, interpret: Interpret) -> None:
        self._interpret = interpret
        self._jitted = jax.jit(self._attend, static_argnames="spec")

    def refuses(self, need: AttentionNeed) -> str | None:
        """Serves float32 and bfloat16, any head size, blocks of whole tiles."""
        if need.dtype not in _SUBLANES:
            return f"it computes in {' or '.join(_SUBLANES)}, not {need.dtype}"
        if need.kv_dtype != need.dtype:
            return f"its cache has the dtype of the activations, {need.dtype}, not {need.kv_dtype}"
        if need.deterministic:
            return "its sums depend on how a sequence is cut into steps"
        if "alibi" in need.features:
            return "it has no ALiBi"
        if need.block_size % (tile := _SUBLANES[need.dtype]):
            return f"in {need.dtype}, a block must be a multiple of {tile}, not {need.block_size}"
        if (size := self._largest_block(need)) > _KEY_BYTES:
            return f"a block of a layer, {size} bytes, is above {_KEY_BYTES}: take smaller ones"
        return None

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys and values in whole lanes."""
        entries = spec.num_kv_heads * need.block_size * Lanes(spec.head_size).width
        return entries * ITEM_SIZE[need.kv_dtype]

    def _largest_block(self, need: AttentionNeed) -> int:
        return max(self.bytes_per_block(spec, need) for spec in need.specs)

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> jax.Array:
        """Zeros, (B, K, P, W)."""
        block = (spec.num_kv_heads, need.block_size, Lanes(spec.head_size).width)
        return jnp.zeros((num_blocks, *block), need.kv_dtype)

    def plan(self, batch: Batch, need: AttentionNeed) -> Plan:
        """Lists of work, in numpy. Raises UnsupportedError if a step has too many blocks."""
        group = max(spec.num_heads // spec.num_kv_heads for spec in need.specs)
        token_bytes = max(spec.num_heads * Lanes(spec.head_size).part * 4 for spec in need.specs)
        queries = max(8, min(_QUERIES // group, _QUERY_BYTES // token_bytes))
        blocks = min(_BLOCKS, _KEYS // need.block_size, _KEY_BYTES // self._largest_block(need))
        tiles = Tiles(
            positions=_SUBLANES[need.dtype],
            queries=1 << (queries.bit_length() - 1),
            blocks=max(1, blocks),
        )
        return make_plan(batch, need, tiles)

    def attend(
        self,
        q_THE: jax.Array,
        k_TKE: jax.Array,
        v_TKE: jax.Array,
        cache: jax.Array,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[jax.Array, jax.Array]:
        """Pure. The cache changes in place where it is donated; zeros for tokens of no row."""
        if not isinstance(plan, Plan):
            raise TypeError(f"a plan of another backend: {type(plan).__name__}")
        # Layers that are alike are traced once. Indices are of 32 bits, whatever the caller has.
        with jax.enable_x64(False):
            alike = replace(spec, layer=0)
            out: tuple[jax.Array, jax.Array] = self._jitted(
                q_THE, k_TKE, v_TKE, cache, plan, spec=alike
            )
        return out

    def _attend(
        self, q_THE: Any, k_TKE: Any, v_TKE: Any, cache: Any, plan: Plan, spec: AttentionSpec
    ) -> tuple[jax.Array, jax.Array]:
        fresh_TKW = Lanes(spec.head_size).join(k_TKE, v_TKE).astype(cache.dtype)
        cache = write(cache, fresh_TKW.swapaxes(0, 1), plan.writes, self._interpret)
        window, lens_T11 = spec.window or 0, jnp.asarray(plan.lens_T)[:, None, None]
        one_THE = self._attended(q_THE, cache, plan.one[window], plan, spec)
        out_THE = jnp.where(lens_T11 == 1, one_THE, jnp.zeros_like(one_THE))
        if plan.several:
            several_THE = self._attended(q_THE, cache, plan.several[window], plan, spec)
            out_THE = jnp.where(lens_T11 > 1, several_THE, out_THE)
        return out_THE, cache

    def _attended(
        self, q_THE: jax.Array, cache: jax.Array, work: Work, plan: Plan, spec: AttentionSpec
    ) -> jax.Array:
        """What the kernel gives, with the queries in tiles on the way."""
        (num_tokens, num_heads, _), num_kv_heads = q_THE.shape, cache.shape[1]
        lanes, group = Lanes(spec.head_size), num_heads // num_kv_heads
        q_THE = jnp.pad(lanes.query(q_THE), ((0, -num_tokens % work.tile), (0, 0), (0, 0)))
        split = q_THE.reshape(-1, work.tile, num_kv_heads, group, lanes.part)
        q_NKQE = split.transpose(0, 2, 3, 1, 4).reshape(
            -1, num_kv_heads, group * work.tile, lanes.part
        )
        out_NKQE = attend(q_NKQE, cache, work, plan, spec, self._interpret)
        out = out_NKQE.reshape(-1, num_kv_heads, group, work.tile, lanes.part)
        out_THE = out.transpose(0, 3, 1, 2, 4).reshape(-1, num_heads, lanes.part)
        return lanes.result(out_THE)[:num_tokens]

    def copy_blocks(self, caches: Sequence[jax.Array], pairs: IntArray) -> list[jax.Array]:
        """Pure, like ``attend``; pairs (0, 0) fill up."""
        return [cache.at[pairs[:, 1]].set(cache[pairs[:, 0]]) for cache in caches]
