"""Query vectors against tiles of keys and values from the paged cache: what all kernels share.

Softmax online (Milakov and Gimelshein, 2018), in the order of FlashAttention-2 (Dao, 2023): sums
are divided once, at the end. Scores are in base 2. Keys and values are found block by block through
the row's table (Kwon et al., 2023), so that tiles and blocks have sizes of their own.
"""

from __future__ import annotations

from dovetail.attention_backends.triton.kernels.codes import decoded
from dovetail.attention_backends.triton.kernels.language import jit, tl

__all__ = ["attend_tiles", "loaded_queries", "loaded_slopes", "start_sums"]


@jit
def loaded_queries(
    q_ptr: tl.tensor,
    offsets: tl.tensor,
    valid: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    FORMAT: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tensor:
    """Query vectors as operands, (rows, WIDTH), and the factor of their scores, (rows,).

    Where the cache is coded, a query is made of numbers within -1 and 1, as codes have no large
    ones either: whatever its dtype was, float16 then holds it.
    """
    at = tl.arange(0, WIDTH)
    mask = valid[:, None] & (at < SIZE)[None, :]
    q = tl.load(q_ptr + offsets[:, None] + at[None, :], mask=mask, other=0.0)
    if FORMAT == "plain":
        factor = tl.full(valid.shape, SCALE, tl.float32)
    else:
        wide = q.to(tl.float32)
        peak = tl.max(tl.abs(wide), axis=1)
        peak = tl.where(peak == 0.0, 1.0, peak)
        q = wide / peak[:, None]
        factor = peak * SCALE
    return q.to(DOT), factor


@jit
def loaded_slopes(
    slopes_ptr: tl.tensor, heads: tl.tensor, valid: tl.tensor, ALIBI: tl.constexpr
) -> tl.tensor:
    """ALiBi's slope of each query vector, (rows,), in base 2 (Press et al., 2022)."""
    if ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=valid, other=0.0)
    else:
        slopes = tl.zeros(valid.shape, tl.float32)
    return slopes


@jit
def start_sums(ROWS: tl.constexpr, WIDTH: tl.constexpr) -> tl.tensor:
    """Weighted values (ROWS, WIDTH), weights (ROWS,) and largest scores (ROWS,) of no keys."""
    return (
        tl.zeros([ROWS, WIDTH], tl.float32),
        tl.zeros([ROWS], tl.float32),
        tl.full([ROWS], float("-inf"), tl.float32),
    )


@jit
def attend_tiles(
    sums: tl.tuple,
    q: tl.tensor,
    factor: tl.tensor,
    slopes: tl.tensor,
    positions: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    table_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor,
    head: tl.tensor,
    KV_HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    TILE: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
    DOT: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Add the keys of the tiles from position ``first`` up to ``end`` to the sums.

    Args:
        sums: As ``start_sums`` makes them.
        q: (rows, KEY_WIDTH) and ``factor``, ``slopes``, ``positions``, (rows,): the queries.
        first: A multiple of TILE, in positions.
        end: In positions.
        low: What lies before this position, or from ``high`` on, is not read: it may be anything.
        table_ptr: The row's blocks.
        head: The KV head.
        MASKED: Some query does not see all of these keys; else all do, and all are read.

    Returns:
        The sums.
    """
    acc, total, peak = sums
    key_at, value_at = tl.arange(0, KEY_WIDTH), tl.arange(0, VALUE_WIDTH)
    for start in range(first, end, TILE):
        at = start + tl.arange(0, TILE)
        inside = (at >= low) & (at < high)
        if MASKED:
            block = tl.load(table_ptr + at // BLOCK, mask=inside, other=0)
        else:
            block = tl.load(table_ptr + at // BLOCK)
        place = (block.to(tl.int64) * KV_HEADS + head) * BLOCK + at % BLOCK
        raw = _vectors(keys_ptr, place, key_at, inside, KEY_SIZE, KEY_WIDTH, MASKED)
        k = decoded(raw, FORMAT, NATIVE, DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if FORMAT != "plain":
            scale = _scales(key_scales_ptr, place, inside, MASKED)
            scores = scores * (factor[:, None] * scale[None, :])
        distance = positions[:, None] - at[None, :]
        scores = _biased(scores, slopes, distance, SCALE, CAP, ALIBI, FORMAT)
        if MASKED:
            seen = distance >= 0
            if WINDOW:
                seen = seen & (distance < WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        # What is still to be multiplied goes with the exponent's subtraction, in one instruction.
        LATE: tl.constexpr = SCALE if FORMAT == "plain" and CAP == 0.0 and not ALIBI else 1.0
        higher = tl.maximum(peak, tl.max(scores, axis=1) * LATE)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores * LATE - base[:, None])
        shrink = tl.exp2(peak - base)
        total = total * shrink + tl.sum(weights, axis=1)
        peak = higher
        acc = acc * shrink[:, None]
        raw = _vectors(values_ptr, place, value_at, inside, VALUE_SIZE, VALUE_WIDTH, MASKED)
        v = decoded(raw, FORMAT, NATIVE, DOT)
        if FORMAT == "plain":
            acc = tl.dot(weights.to(DOT), v, acc, input_precision="ieee")
        else:
            scale = _scales(value_scales_ptr, place, inside, MASKED)
            largest = tl.max(scale, axis=0)
            largest = tl.where(largest == 0.0, 1.0, largest)
            weights = (weights * (scale / largest)[None, :]).to(DOT)
            acc += tl.dot(weights, v, input_precision="ieee") * largest
    return acc, total, peak


@jit
def _vectors(
    x_ptr: tl.tensor,
    place: tl.tensor,
    entry: tl.tensor,
    inside: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Vectors of the cache, (TILE, WIDTH); 0 where there is nothing to be read."""
    pointers = x_ptr + place[:, None] * SIZE + entry[None, :]
    if MASKED and SIZE < WIDTH:
        x = tl.load(pointers, mask=inside[:, None] & (entry < SIZE)[None, :], other=0)
    elif MASKED:
        x = tl.load(pointers, mask=inside[:, None], other=0)
    elif SIZE < WIDTH:
        x = tl.load(pointers, mask=(entry < SIZE)[None, :], other=0)
    else:
        x = tl.load(pointers)
    return x


@jit
def _scales(
    scales_ptr: tl.tensor, place: tl.tensor, inside: tl.tensor, MASKED: tl.constexpr
) -> tl.tensor:
    """Of coded vectors, (TILE,) float32."""
    if MASKED:
        scale = tl.load(scales_ptr + place, mask=inside, other=0.0)
    else:
        scale = tl.load(scales_ptr + place)
    return scale.to(tl.float32)


@jit
def _biased(
    scores: tl.tensor,
    slopes: tl.tensor,
    distance: tl.tensor,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    ALIBI: tl.constexpr,
    FORMAT: tl.constexpr,
) -> tl.tensor:
    """Scores with soft cap and slopes, in base 2; unscaled where there is neither.

    The cap is a tanh made of an exponential, which loses no more than float32 has.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if FORMAT == "plain" and (CAP > 0.0 or ALIBI):
        scores = scores * SCALE
    if CAP > 0.0:
        scores = (CAP * LOG2E) * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / CAP)) + 1.0))
    if ALIBI:
        scores = scores - slopes[:, None] * distance.to(tl.float32)
    return scores
