"""Rows with many query tokens."""

from __future__ import annotations

from dovetail.attention_backends.triton.kernels.language import jit, kernel, tl
from dovetail.attention_backends.triton.kernels.tiles import (
    attend_tiles,
    loaded_queries,
    loaded_slopes,
    start_sums,
)

__all__ = ["prefill"]


@kernel
def prefill(
    q_ptr: tl.tensor,
    out_ptr: tl.tensor,
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
    num_rows: tl.tensor,
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
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    """One program is a tile of query tokens of one row, with all query heads of one KV head.

    Row r has the tiles from ``starts[r] // QUERIES + r`` on: room for all of its own, whatever the
    rows before it have, so that T // QUERIES + num_rows + 1 programs are enough for any step. The
    last tiles have the most keys before them and are begun first.

    Args:
        q_ptr: (T, HEADS, KEY_SIZE) with strides.
        out_ptr: (T, HEADS, VALUE_SIZE)
        keys_ptr: The cache (``cache.py``).
        values_ptr: The cache.
        key_scales_ptr: The cache, where entries are coded.
        value_scales_ptr: The cache, where entries are coded.
        slopes_ptr: (HEADS,) where ALIBI.
        starts_ptr: (num_rows + 2,) where rows begin; the last are the tokens of no row, and T.
        lens_ptr: (num_rows,) lengths of the sequences.
        meta_ptr: Its first number is the width of the tables.
        tables_ptr: (num_rows, width)
        FEW: Rows with so many tokens, or fewer, are not done here.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = _row_of_tile(starts_ptr, tile, num_rows, QUERIES)
    begin = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - begin
    skipped = (tile - begin // QUERIES - row) * QUERIES
    void = row == num_rows
    if (skipped >= count) | ((count <= FEW) & (row < num_rows)):
        return
    rows = tl.arange(0, ROWS)
    query, heads = skipped + rows // GROUP, head * GROUP + rows % GROUP
    valid = (rows < QUERIES * GROUP) & (query < count)
    token = (begin + query).to(tl.int64)
    length = tl.load(lens_ptr + row, mask=row < num_rows, other=0)
    before = tl.where(void, 0, length - count) + skipped
    high = tl.where(void, 0, tl.minimum(before + QUERIES, length))
    low = tl.maximum(before - WINDOW + 1, 0) if WINDOW else 0
    q, factor = loaded_queries(
        q_ptr, token * q_token + heads * q_head, valid,
        KEY_SIZE, KEY_WIDTH, SCALE, FORMAT, DOT,
    )  # fmt: skip
    slopes = loaded_slopes(slopes_ptr, heads, valid, ALIBI)
    table_ptr = tables_ptr + row.to(tl.int64) * tl.load(meta_ptr)
    positions = before + rows // GROUP
    sums = start_sums(ROWS, VALUE_WIDTH)
    first = low // TILE * TILE
    if WINDOW == 0:
        seen_by_all = tl.minimum(before + 1, high) // TILE * TILE
        sums = attend_tiles(
            sums, q, factor, slopes, positions, 0, seen_by_all, low, high, table_ptr,
            keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, head,
            KV_HEADS, BLOCK, KEY_SIZE, KEY_WIDTH, VALUE_SIZE, VALUE_WIDTH, TILE,
            SCALE, CAP, WINDOW, ALIBI, FORMAT, NATIVE, DOT, False,
        )  # fmt: skip
        first = seen_by_all
    acc, total, _ = attend_tiles(
        sums, q, factor, slopes, positions, first, high, low, high, table_ptr,
        keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, head,
        KV_HEADS, BLOCK, KEY_SIZE, KEY_WIDTH, VALUE_SIZE, VALUE_WIDTH, TILE,
        SCALE, CAP, WINDOW, ALIBI, FORMAT, NATIVE, DOT, True,
    )  # fmt: skip
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    entry = tl.arange(0, VALUE_WIDTH)
    place = (token * HEADS + heads) * VALUE_SIZE
    mask = valid[:, None] & (entry < VALUE_SIZE)[None, :]
    tl.store(out_ptr + place[:, None] + entry[None, :], out.to(out_ptr.dtype.element_ty), mask=mask)


@jit
def _row_of_tile(
    starts_ptr: tl.tensor, tile: tl.tensor, num_rows: tl.tensor, QUERIES: tl.constexpr
) -> tl.tensor:
    """The last row whose tiles do not begin behind this one; ``num_rows`` for tokens of no row."""
    low = tile * 0
    high = low + num_rows
    while low < high:
        middle = (low + high + 1) // 2
        begins = tl.load(starts_ptr + middle) // QUERIES + middle <= tile
        low = tl.where(begins, middle, low)
        high = tl.where(begins, high, middle - 1)
    return low
