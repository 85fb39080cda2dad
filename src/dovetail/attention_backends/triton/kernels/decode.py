"""Rows with few query tokens: their keys are shared out to several programs (Dao et al., 2023)."""

from __future__ import annotations

from dovetail.attention_backends.triton.kernels.language import kernel, tl
from dovetail.attention_backends.triton.kernels.tiles import attended, store_rows

__all__ = ["decode", "reduce"]


@kernel
def decode(
    q_ptr: tl.tensor, out_ptr: tl.tensor, partial_ptr: tl.tensor, weight_ptr: tl.tensor,
    keys_ptr: tl.tensor, values_ptr: tl.tensor, key_scales_ptr: tl.tensor,
    value_scales_ptr: tl.tensor, slopes_ptr: tl.tensor, starts_ptr: tl.tensor,
    lens_ptr: tl.tensor, meta_ptr: tl.tensor, tables_ptr: tl.tensor,
    q_token: tl.tensor, q_head: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, FORMAT: tl.constexpr,
    NATIVE: tl.constexpr, DOT: tl.constexpr, FEW: tl.constexpr, ALONE: tl.constexpr,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
) -> None:  # fmt: skip
    """One program is a part of the keys of one row, with all query heads of one KV head.

    The grid is (parts, KV heads, rows). Where there are several parts (SPLIT), one without keys
    ends at once, and what was attended goes to ``partial_ptr``, (R, FEW, H, parts, VALUE_SIZE)
    float32, and the log-sum-exp of its scores to ``weight_ptr``, (R, FEW, H, parts) float32.
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
            tl.store(weight_ptr + item, tl.full([ROWS], float("-inf"), tl.float32), mask=valid)
            return
    token = (begin + query).to(tl.int64)
    table_ptr = tables_ptr + row.to(tl.int64) * tl.load(meta_ptr)
    out, weight = attended(
        q_ptr, token * q_token + heads * q_head, valid, slopes_ptr, heads,
        before + query, first, first, end, low, length,
        table_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, head,
        KV_HEADS, BLOCK, KEY_SIZE, KEY_WIDTH, VALUE_SIZE, VALUE_WIDTH, ROWS, TILE,
        SCALE, CAP, WINDOW, ALIBI, FORMAT, NATIVE, DOT, False,
    )  # fmt: skip
    if SPLIT:
        tl.store(weight_ptr + item, weight, mask=valid)
        store_rows(partial_ptr, item, out, valid, VALUE_SIZE, VALUE_WIDTH)
    else:
        store_rows(out_ptr, token * HEADS + heads, out, valid, VALUE_SIZE, VALUE_WIDTH)


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
    """Merge the PARTS of one query vector: their average, weighted by what the scores sum up to.

    The grid is (rows, FEW * H). PARTS is a power of two; empty parts hold nothing and are not read.
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
    sums = tl.load(weight_ptr + place)
    held = sums != float("-inf")
    peak = tl.max(sums, axis=0)
    weights = tl.exp2(sums - tl.where(peak == float("-inf"), 0.0, peak))
    entry = tl.arange(0, VALUE_WIDTH)
    mask = held[:, None] & (entry < VALUE_SIZE)[None, :]
    pointers = partial_ptr + place[:, None] * VALUE_SIZE + entry[None, :]
    parts = tl.load(pointers, mask=mask, other=0.0)
    total = tl.sum(weights, axis=0)
    out = tl.sum(parts * weights[:, None], axis=0) / tl.where(total == 0.0, 1.0, total)
    to = ((begin + query).to(tl.int64) * HEADS + head) * VALUE_SIZE + entry
    tl.store(out_ptr + to, out.to(out_ptr.dtype.element_ty), mask=entry < VALUE_SIZE)
