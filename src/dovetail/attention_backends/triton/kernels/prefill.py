"""Rows with many query tokens."""

from __future__ import annotations

from dovetail.attention_backends.triton.kernels.language import jit, kernel, tl
from dovetail.attention_backends.triton.kernels.tiles import attended, store_rows

__all__ = ["prefill"]


@kernel
def prefill(
    q_ptr: tl.tensor, out_ptr: tl.tensor, keys_ptr: tl.tensor, values_ptr: tl.tensor,
    key_scales_ptr: tl.tensor, value_scales_ptr: tl.tensor, slopes_ptr: tl.tensor,
    starts_ptr: tl.tensor, lens_ptr: tl.tensor, meta_ptr: tl.tensor, tables_ptr: tl.tensor,
    q_token: tl.tensor, q_head: tl.tensor, num_rows: tl.tensor,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, KEY_SIZE: tl.constexpr, KEY_WIDTH: tl.constexpr,
    VALUE_SIZE: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK: tl.constexpr, SCALE: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, ALIBI: tl.constexpr, FORMAT: tl.constexpr,
    NATIVE: tl.constexpr, DOT: tl.constexpr, FEW: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:  # fmt: skip
    """One program is a tile of query tokens of one row, with all query heads of one KV head.

    Row r has the tiles from ``starts[r] // QUERIES + r`` on: room for all of its own, whatever the
    rows before it have, so that T // QUERIES + num_rows + 1 programs are enough for any step. The
    last tiles have the most keys before them and are begun first. Tokens of no row are one more
    row, which sees nothing and gets zeros.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    QUERIES: tl.constexpr = ROWS // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    row = _row_of_tile(starts_ptr, tile, num_rows, QUERIES)
    begin = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - begin
    skipped = (tile - begin // QUERIES - row) * QUERIES
    if (skipped >= count) | ((count <= FEW) & (row < num_rows)):
        return
    rows = tl.arange(0, ROWS)
    query, heads = skipped + rows // GROUP, head * GROUP + rows % GROUP
    valid = (rows < QUERIES * GROUP) & (query < count)
    token = (begin + query).to(tl.int64)
    length = tl.load(lens_ptr + row, mask=row < num_rows, other=0)
    before = length - count + skipped
    high = tl.minimum(before + QUERIES, length)
    low = tl.maximum(before - WINDOW + 1, 0) if WINDOW else 0
    first = low // TILE * TILE
    shared = tl.minimum(before + 1, high) // TILE * TILE
    table_ptr = tables_ptr + row.to(tl.int64) * tl.load(meta_ptr)
    out, _ = attended(
        q_ptr, token * q_token + heads * q_head, valid, slopes_ptr, heads,
        before + rows // GROUP, first, shared, high, low, high,
        table_ptr, keys_ptr, values_ptr, key_scales_ptr, value_scales_ptr, head,
        KV_HEADS, BLOCK, KEY_SIZE, KEY_WIDTH, VALUE_SIZE, VALUE_WIDTH, ROWS, TILE,
        SCALE, CAP, WINDOW, ALIBI, FORMAT, NATIVE, DOT, WINDOW == 0,
    )  # fmt: skip
    store_rows(out_ptr, token * HEADS + heads, out, valid, VALUE_SIZE, VALUE_WIDTH)


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
