"""Query vectors against tiles of keys and values from the paged cache: what all kernels share.

Softmax online (Milakov and Gimelshein, 2018), in the order of FlashAttention-2 (Dao, 2023): sums
are divided once, at the end. Scores are in base 2. Keys and values are found block by block through
the row's table (Kwon et al., 2023), so that tiles and blocks have sizes of their own.
"""

from __future__ import annotations

from dovetail.attention_backends.triton.kernels.codes import decoded
from dovetail.attention_backends.triton.kernels.language import jit, tl

__all__ = ["attended", "store_rows"]


@jit
def attended(
    q_ptr: tl.tensor, offsets: tl.tensor, valid: tl.tensor, slopes_ptr: tl.tensor,
    heads: tl.tensor, positions: tl.tensor,
    first: tl.tensor, shared: tl.tensor, end: tl.tensor, low: tl.tensor, high: tl.tensor,
    table_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor, value_scales_ptr: tl.tensor, head: tl.tensor,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, KEY_SIZE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr, VALUE_WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr,
    FORMAT: tl.constexpr, NATIVE: tl.constexpr, DOT: tl.constexpr, SHARED: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """What query vectors of one row get from the keys in tiles from ``first`` up to ``end``.

    Args:
        offsets: (ROWS,) where the vectors are behind ``q_ptr``, those that are ``valid``.
        heads: (ROWS,) their query heads; ``head`` is the KV head of all.
        positions: (ROWS,) theirs.
        first: A multiple of TILE.
        shared: Where SHARED, all of them see all keys before this position, a multiple of TILE.
        low: What lies before this position, or from ``high`` on, is not read: it may be anything.
        table_ptr: The row's blocks.

    Returns:
        Weighted values (ROWS, VALUE_WIDTH) and the log-sum-exp of the scores (ROWS,), in base 2.
        Without any key: 0 and minus infinity.
    """
    q, factor = _queries(q_ptr, offsets, valid, KEY_SIZE, KEY_WIDTH, SCALE, FORMAT, DOT)
    slopes = tl.zeros([ROWS], tl.float32)
    if ALIBI:
        slopes = tl.load(slopes_ptr + heads, mask=valid, other=0.0)
    acc = tl.zeros([ROWS, VALUE_WIDTH], tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    if SHARED:
        acc, total, peak = _add_tiles(
            acc, total, peak, q, factor, slopes, positions, first, shared, low, high,
            table_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, head,
            KV_HEADS, BLOCK, KEY_SIZE, KEY_WIDTH, VALUE_SIZE, VALUE_WIDTH, TILE,
            SCALE, CAP, WINDOW, ALIBI, FORMAT, NATIVE, DOT, False,
        )  # fmt: skip
        first = shared
    acc, total, peak = _add_tiles(
        acc, total, peak, q, factor, slopes, positions, first, end, low, high,
        table_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, head,
        KV_HEADS, BLOCK, KEY_SIZE, KEY_WIDTH, VALUE_SIZE, VALUE_WIDTH, TILE,
        SCALE, CAP, WINDOW, ALIBI, FORMAT, NATIVE, DOT, True,
    )  # fmt: skip
    some = tl.where(total == 0.0, 1.0, total)
    return acc / some[:, None], peak + tl.log2(some)


@jit
def store_rows(
    x_ptr: tl.tensor,
    vectors: tl.tensor,
    x: tl.tensor,
    valid: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    """Store vectors by their numbers, those that are ``valid``, in the dtype that is there."""
    at = tl.arange(0, WIDTH)
    mask = valid[:, None] & (at < SIZE)[None, :]
    place = vectors[:, None] * SIZE + at[None, :]
    tl.store(x_ptr + place, x.to(x_ptr.dtype.element_ty), mask=mask)


@jit
def _queries(
    q_ptr: tl.tensor,
    offsets: tl.tensor,
    valid: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    SCALE: tl.constexpr,
    FORMAT: tl.constexpr,
    DOT: tl.constexpr,
) -> tl.tuple:
    """Query vectors as operands, (ROWS, WIDTH), and the factor of their scores, (ROWS,).

    Where the cache is coded, a query is made of numbers within -1 and 1, as codes are small ones:
    whatever its dtype was, float16 then holds it.
    """
    at = tl.arange(0, WIDTH)
    mask = valid[:, None] & (at < SIZE)[None, :]
    q = tl.load(q_ptr + offsets[:, None] + at[None, :], mask=mask, other=0.0)
    factor = tl.full(valid.shape, SCALE, tl.float32)
    if FORMAT != "plain":
        wide = q.to(tl.float32)
        largest = tl.max(tl.abs(wide), axis=1)
        largest = tl.where(largest == 0.0, 1.0, largest)
        q = wide / largest[:, None]
        factor = largest * SCALE
    return q.to(DOT), factor


@jit
def _add_tiles(
    acc: tl.tensor, total: tl.tensor, peak: tl.tensor, q: tl.tensor, factor: tl.tensor,
    slopes: tl.tensor, positions: tl.tensor,
    first: tl.tensor, end: tl.tensor, low: tl.tensor, high: tl.tensor,
    table_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor, value_scales_ptr: tl.tensor, head: tl.tensor,
    KV_HEADS: tl.constexpr, BLOCK: tl.constexpr, KEY_SIZE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr, VALUE_WIDTH: tl.constexpr, TILE: tl.constexpr,
    SCALE: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr,
    FORMAT: tl.constexpr, NATIVE: tl.constexpr, DOT: tl.constexpr, MASKED: tl.constexpr,
) -> tl.tuple:  # fmt: skip
    """Add tiles to the weighted values, the weights and the largest scores, and return those.

    MASKED: some query does not see all of these keys; else all do, and all are read.
    """
    for start in range(first, end, TILE):
        at = start + tl.arange(0, TILE)
        inside = (at >= low) & (at < high)
        if MASKED:
            block = tl.load(table_ptr + at // BLOCK, mask=inside, other=0)
        else:
            block = tl.load(table_ptr + at // BLOCK)
        place = (block.to(tl.int64) * KV_HEADS + head) * BLOCK + at % BLOCK
        raw = _vectors(keys_ptr, place, inside, KEY_SIZE, KEY_WIDTH, MASKED)
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
        raw = _vectors(values_ptr, place, inside, VALUE_SIZE, VALUE_WIDTH, MASKED)
        v = decoded(raw, FORMAT, NATIVE, DOT)
        acc = acc * shrink[:, None]
        if FORMAT == "plain":
            acc = tl.dot(weights.to(DOT), v, acc, input_precision="ieee")
        else:
            scale = _scales(value_scales_ptr, place, inside, MASKED)
            largest = tl.max(scale, axis=0)
            largest = tl.where(largest == 0.0, 1.0, largest)
            # Small weights must not be lost in float16, nor sums in float32.
            weights = (weights * (scale / largest * 1024.0)[None, :]).to(DOT)
            acc += tl.dot(weights, v, input_precision="ieee") * (largest / 1024.0)
    return acc, total, peak


@jit
def _vectors(
    x_ptr: tl.tensor,
    place: tl.tensor,
    inside: tl.tensor,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Vectors of the cache, (TILE, WIDTH); 0 where there is nothing to be read."""
    entry = tl.arange(0, WIDTH)
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

    The cap is a tanh made of an exponential, which loses no more than float32 has. ALiBi's slopes
    are those of Press et al., 2022.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    if FORMAT == "plain" and (CAP > 0.0 or ALIBI):
        scores = scores * SCALE
    if CAP > 0.0:
        scores = (CAP * LOG2E) * (1.0 - 2.0 / (tl.exp2(scores * (2.0 * LOG2E / CAP)) + 1.0))
    if ALIBI:
        scores = scores - slopes[:, None] * distance.to(tl.float32)
    return scores
