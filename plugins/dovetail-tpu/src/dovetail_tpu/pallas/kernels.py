"""The two kernels. Each goes through a list that the host made, so that nothing runs in vain.

Q queries of a KV head make a tile: those of one query head after another, of some tokens. Caches
are (B, K, P, W): W lanes hold a key and a value (``lanes.py``).
"""

from __future__ import annotations

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from dovetail.core.contracts.attention import AttentionSpec
from dovetail_tpu.pallas.lanes import Lanes
from dovetail_tpu.pallas.plan import Plan, Work

__all__ = ["Interpret", "attend", "write"]

Interpret: TypeAlias = bool | pltpu.InterpretParams

_UNSEEN = -1e30
"""Score of a key that is not seen. Finite: the difference of two of them is 0, not NaN, and what a
query gathers before the first key that it sees fades to nothing then."""
_VMEM_BYTES = 32 << 20
"""What a kernel may take: half of what the smallest generation from v5 on has."""


def write(cache: jax.Array, fresh_KTW: jax.Array, work: Work, interpret: Interpret) -> jax.Array:
    """Put the step's keys and values into the cache, in place.

    A tile of memory is the least that can be addressed: each is read, mixed and written back.
    """
    num_heads, num_tokens, width = fresh_KTW.shape
    size, num_lists = work.tile, len(work.lists)
    place = pl.BlockSpec(
        (1, num_heads, size, width), lambda i, block, part, *_: (block[i], 0, part[i], 0)
    )

    def fresh(offset: int) -> pl.BlockSpec:
        return pl.BlockSpec(
            (num_heads, size, width),
            lambda i, block, part, token, *_: (0, lax.div(token[i], np.int32(size)) + offset, 0),
        )

    # A place takes tokens from two tiles of them; the last may lie behind all tokens.
    filled = jnp.pad(fresh_KTW, ((0, 0), (0, -num_tokens % size + size), (0, 0)))
    return _call(
        _write_tile,
        work,
        inputs=[(fresh(0), filled), (fresh(1), filled), (place, cache)],
        out_spec=place,
        out=cache,
        interpret=interpret,
        name="write_kv",
        input_output_aliases={num_lists + 2: 0},
    )


def _write_tile(
    block: Any, part: Any, token: Any, low: Any, high: Any, one: Any, two: Any, old: Any, out: Any
) -> None:
    i, size = pl.program_id(0), one.shape[1]
    # Only 32-bit entries can be moved by an amount that is not known before.
    pair = jnp.concatenate([one[...], two[...]], axis=1).astype(jnp.float32)
    shift = low[i] - lax.rem(token[i], np.int32(size)) + 2 * size
    moved = pltpu.roll(pair, shift, axis=1)[:, :size]
    place = lax.broadcasted_iota(jnp.int32, moved.shape, 1)
    ours = (place >= low[i]) & (place < high[i])
    out[0] = jnp.where(ours, moved, old[0].astype(jnp.float32)).astype(out.dtype)


def attend(
    q_NKQE: jax.Array,
    cache: jax.Array,
    work: Work,
    plan: Plan,
    spec: AttentionSpec,
    interpret: Interpret,
) -> jax.Array:
    """Online softmax (Milakov and Gimelshein, 2018) over the paged keys of each query's row.

    Args:
        q_NKQE: N tiles of queries in whole lanes.
        cache: With this step's keys and values.
        work: Of the plan: which of them meet which keys.
        plan: Of the step.
        spec: Scale, soft cap and window; heads are those of the arrays.
        interpret: As for ``PallasAttention``.

    Returns:
        As ``q_NKQE``. A tile that the list does not name may hold anything.
    """
    _, num_heads, num_queries, size = q_NKQE.shape
    tile = pl.BlockSpec((1, num_heads, num_queries, size), lambda i, tile, *_: (tile[i], 0, 0, 0))

    def block(n: int) -> pl.BlockSpec:
        def index(
            i: Any, tile: Any, row: Any, keys: Any, _starts: Any, _before: Any, table: Any
        ) -> Any:
            return table[(row[i] * plan.key_tiles + keys[i]) * plan.blocks + n], 0, 0, 0

        return pl.BlockSpec((1, *cache.shape[1:]), index)

    column = pltpu.VMEM((num_heads, num_queries, 1), jnp.float32)
    return _call(
        functools.partial(_attend_tile, query_tile=work.tile, spec=spec),
        work,
        *plan.rows,
        inputs=[(tile, q_NKQE), *((block(n), cache) for n in range(plan.blocks))],
        out_spec=tile,
        out=q_NKQE,
        interpret=interpret,
        name="attend_one" if work.tile == 1 else "attend_several",
        scratch_shapes=[column, column, pltpu.VMEM((num_heads, num_queries, size), jnp.float32)],
    )


def _attend_tile(
    tile: Any, row: Any, keys: Any, starts: Any, before: Any, table: Any, q: Any, *refs: Any,
    query_tile: int, spec: AttentionSpec,
) -> None:  # fmt: skip
    *blocks, out, peak, total, acc = refs
    i, end = pl.program_id(0), pl.num_programs(0) - 1
    lanes, num_keys = Lanes(spec.head_size), len(blocks) * blocks[0].shape[2]
    # One query of each head is too little to keep the units busy with one head at a time.
    num_heads, at_once = acc.shape[0], acc.shape[0] if query_tile == 1 else 1

    @pl.when((i == 0) | (tile[jnp.maximum(i - 1, 0)] != tile[i]))
    def _() -> None:
        peak[...] = jnp.full_like(peak, _UNSEEN)
        total[...] = jnp.zeros_like(total)
        acc[...] = jnp.zeros_like(acc)

    own, seen, known = _masks(
        acc.shape[1], num_keys, tile[i] * query_tile, keys[i] * num_keys,
        starts[row[i]], starts[row[i] + 1], before[row[i]], query_tile, spec.window,
    )  # fmt: skip

    def heads(step: Any, _: None) -> None:
        some = pl.ds(step * at_once, at_once)
        entries = jnp.concatenate([block[0, some] for block in blocks], axis=1)
        scores = _product(q[0, some], lanes.keys(entries), 2) * spec.scale
        if spec.soft_cap is not None:
            scores = spec.soft_cap * jnp.tanh(scores / spec.soft_cap)
        scores = jnp.where(seen, scores, _UNSEEN)
        higher = jnp.maximum(peak[some], scores.max(-1, keepdims=True))
        weights = jnp.exp(scores - higher)
        fade = jnp.exp(peak[some] - higher)
        # What is no key of the row may be anything, and 0 * NaN is NaN.
        values = lanes.values(entries)
        values = jnp.where(known, values, jnp.zeros_like(values))
        gained = _product(weights.astype(values.dtype), values, 1)
        peak[some] = higher
        total[some] = fade * total[some] + weights.sum(-1, keepdims=True)
        acc[some] = jnp.where(own, fade * acc[some] + gained, acc[some])

    lax.fori_loop(np.int32(0), np.int32(num_heads // at_once), heads, None)

    @pl.when((i == end) | (tile[jnp.minimum(i + 1, end)] != tile[i]))
    def _() -> None:
        out[0] = (acc[...] / total[...]).astype(out.dtype)


def _masks(
    num_queries: int, num_keys: int, token: Any, key: Any, start: Any, end: Any, before: Any,
    query_tile: int, window: int | None,
) -> tuple[jax.Array, jax.Array, jax.Array]:  # fmt: skip
    """Queries of the row, (1, Q, 1); the keys they see, (1, Q, L); keys of the row, (1, L, 1)."""
    tokens = token + (lax.broadcasted_iota(jnp.int32, (1, num_queries, 1), 1) & (query_tile - 1))
    own = (tokens >= start) & (tokens < end)
    query_at = jnp.where(own, tokens - start + before, -1)
    key_at = key + lax.broadcasted_iota(jnp.int32, (1, 1, num_keys), 2)
    value_at = key + lax.broadcasted_iota(jnp.int32, (1, num_keys, 1), 1)
    seen, known = key_at <= query_at, value_at < before + end - start
    if window is None:
        return own, seen, known
    return own, seen & (key_at > query_at - window), known & (value_at > before - window)


def _product(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """Head by head, the last axis of ``a`` with ``axis`` of ``b``; float32."""
    exact = lax.Precision.HIGHEST if a.dtype == jnp.float32 else lax.Precision.DEFAULT
    numbers = (((2,), (axis,)), ((0,), (0,)))
    return lax.dot_general(a, b, numbers, precision=exact, preferred_element_type=jnp.float32)


def _call(
    kernel: Any, work: Work, *more: Any, inputs: list[Any], out_spec: Any, out: Any,
    interpret: Interpret, name: str, scratch_shapes: Any = (), **options: Any,
) -> jax.Array:  # fmt: skip
    lists, (in_specs, operands) = (*work.lists, *more), zip(*inputs, strict=True)
    result: jax.Array = pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(lists),
            grid=(jnp.asarray(work.count),),
            in_specs=list(in_specs),
            out_specs=out_spec,
            scratch_shapes=list(scratch_shapes),
        ),
        out_shape=jax.typeof(out),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary",), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=interpret,
        name=name,
        **options,
    )(*lists, *operands)
    return result
