"""Rows with few query tokens: their keys are shared out to several programs (Dao et al., 2023)."""

from __future__ import annotations

from dovetail.attention_backends.triton.kernels.language import kernel, tl
from dovetail.attention_backends.triton.kernels.tiles import (
    attend_tiles,
    loaded_queries,
    loaded_slopes,
    start_sums,
)

__all__ = ["decode", "reduce"]


@kernel
def decode(
    q_ptr: tl.tensor,
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    keys_ptr: tl.tensor,
    values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor,
    slopes_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lens_ptr: tl.tensor,
    meta_ptr: tl.tensor,
    tables_ptr: tl.tensor,
    q_token: tl.tensor,
    q_head: tl.tensor,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    KEY_SIZE: tl.constexpr,
    KEY_WIDTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    CAP: tl.constexpr,
    WINDOW: tl.constexpr,
    ALIBI: tl.constexpr,
    FORMAT: tl.constexpr,
    NATIVE: tl.constexpr,
    DOT: tl.constexpr,
    FEW: tl.constexpr,
    ALONE: tl.constexpr,
    SPLIT: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program is a part of the keys of one row, with all query heads of one KV head.

    The grid is (parts, KV heads, rows). A part without keys ends at once.

    Args:
        q_ptr: (T, HEADS, KEY_SIZE) with strides.
        out_ptr: (T, HEADS, VALUE_SIZE), written where there is one part.
        partial_ptr: (R, FEW, HEADS, parts, VALUE_SIZE) float32: what was attended in each part.
        weight_ptr: (R, FEW, HEADS, parts) float32: the part's log-sum-exp, in base 2.
        keys_ptr: The cache (``cache.py``).
        values_ptr: The cache.
        key_scales_ptr: The cache, where entries are coded.
        value_scales_ptr: The cache, where entries are coded.
        slopes_ptr: (HEADS,) where ALIBI.
        starts_ptr: (R + 2,) where rows begin.
        lens_ptr: (R,) lengths of the sequences.
        meta_ptr: Its first number is the width of the tables.
        tables_ptr: (R, width)
        FEW: Rows with more tokens are not done here.
        ALONE: Token i is that of row i, or of no row, and then it gets zeros.
        SPLIT: There are several parts.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    split, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    begin = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - begin
    if ALONE:
        begin, most = row, 1
    else:
        most = count
        if (count == 0) | (count > FEW):
            return
    length = tl.load(lens_ptr + row)
    rows = tl.arange(0, ROWS)
    query, heads = rows // GROUP, head * GROUP + rows % GROUP
    valid = (rows < FEW * GROUP) & (query < most)
    before = length - count
    low = tl.maximum(before - WINDOW + 1, 0) if WINDOW else 0
    part = tl.cdiv(tl.cdiv(length, TILE) - low // TILE, tl.num_programs(0)) * TILE
    first = low // TILE * TILE + split * part
    end = tl.minimum(first + part, length)
    item = (row * FEW + query).to(tl.int64) * HEADS + heads
    if SPLIT:
        item = item * tl.num_programs(0) + split
        if first >= end:
            empty = tl.full([ROWS], float("-inf"), tl.float32)
            tl.store(weight_ptr + item, empty, mask=valid)
            return
    token = (begin + query).to(tl.int64)
    q, factor = loaded_queries(
        q_ptr, token * q_token + heads * q_head, valid,
        KEY_SIZE, KEY_WIDTH, SCALE, FORMAT, DOT,
    )  # fmt: skip
    slopes = loaded_slopes(slopes_ptr, heads, valid, ALIBI)
    table_ptr = tables_ptr + row.to(tl.int64) * tl.load(meta_ptr)
    acc, total, peak = attend_tiles(
        start_sums(ROWS, VALUE_WIDTH), q, factor, slopes, before + query,
        first, end, low, length, table_ptr,
        keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, head,
        KV_HEADS, BLOCK, KEY_SIZE, KEY_WIDTH, VALUE_SIZE, VALUE_WIDTH, TILE,
        SCALE, CAP, WINDOW, ALIBI, FORMAT, NATIVE, DOT, True,
    )  # fmt: skip
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    entry = tl.arange(0, VALUE_WIDTH)
    mask = valid[:, None] & (entry < VALUE_SIZE)[None, :]
    if SPLIT:
        tl.store(weight_ptr + item, peak + tl.log2(total), mask=valid)
        tl.store(partial_ptr + item[:, None] * VALUE_SIZE + entry[None, :], out, mask=mask)
    else:
        place = (token * HEADS + heads) * VALUE_SIZE
        out = out.to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + place[:, None] + entry[None, :], out, mask=mask)


@kernel
def reduce(
    out_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    HEADS: tl.constexpr,
    VALUE_SIZE: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,
    FEW: tl.constexpr,
    ALONE: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """Merge the parts of one query vector: their average, by the exponentials of their log-sum-exp.

    The grid is (rows, FEW * HEADS).

    Args:
        out_ptr: (T, HEADS, VALUE_SIZE)
        partial_ptr: As ``decode`` writes it.
        weight_ptr: As ``decode`` writes it.
        starts_ptr: (R + 2,) where rows begin.
        HEADS: Query heads.
        FEW: As in ``decode``.
        ALONE: As in ``decode``.
        PARTS: A power of two.
    """
    row, vector = tl.program_id(0), tl.program_id(1)
    query, head = vector // HEADS, vector % HEADS
    begin = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - begin
    if ALONE:
        begin = row
    else:
        if (count > FEW) | (query >= count):
            return
    item = (row * FEW).to(tl.int64) * HEADS + vector
    place = item * PARTS + tl.arange(0, PARTS)
    weights = tl.load(weight_ptr + place)
    held = weights > float("-inf")
    held = held | (weights != weights)
    peak = tl.max(weights, axis=0)
    weights = tl.exp2(weights - tl.where(peak == float("-inf"), 0.0, peak))
    entry = tl.arange(0, VALUE_WIDTH)
    mask = held[:, None] & (entry < VALUE_SIZE)[None, :]
    parts = tl.load(
        partial_ptr + place[:, None] * VALUE_SIZE + entry[None, :], mask=mask, other=0.0
    )
    total = tl.sum(weights, axis=0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    to = ((begin + query).to(tl.int64) * HEADS + head) * VALUE_SIZE + entry
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=entry < VALUE_SIZE)
