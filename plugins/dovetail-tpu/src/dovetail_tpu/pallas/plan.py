"""What the kernels do in a step, listed by the host. Sizes depend on T, R and M alone.

Rows with one token are attended query by query; those with several, in tiles of queries that are
cut from the T tokens wherever rows begin: a tile may meet several rows.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jax.tree_util import register_dataclass

from dovetail.core.batch import Batch
from dovetail.core.buckets import padded
from dovetail.core.contracts.attention import AttentionNeed
from dovetail.core.errors import UnsupportedError
from dovetail.core.types import IntArray

__all__ = ["Plan", "Tiles", "Work", "make_plan"]

_SMEM_BYTES = 960 << 10
"""For the lists of a kernel: from v5 on there is 1 MiB, and compilers take some of it."""


@dataclass(frozen=True)
class Tiles:
    """The sizes that work is cut into."""

    positions: int
    """Of the cache: what can be written at least, the sublanes of a tile of memory."""
    queries: int
    """Tokens; a power of two."""
    blocks: int
    """Of keys."""


@register_dataclass
@dataclass(frozen=True, kw_only=True)
class Work:
    """What a kernel goes through: of lists of one length, the first ``count`` entries, at least 1.

    To write: block, tile within it, first token, first and last place (exclusive) in the tile.
    To attend: tile of queries, row, tile of the row's keys; by tile of queries.
    """

    count: IntArray
    lists: tuple[IntArray, ...]
    tile: int = field(metadata={"static": True})
    """Positions, or queries, in a tile."""


@register_dataclass
@dataclass(frozen=True, kw_only=True)
class Plan:
    """A step. The last of its R + 1 rows has no tokens: it is the row of work that is none."""

    writes: Work
    one: dict[int, Work]
    """For rows with one token, by window (0: none)."""
    several: dict[int, Work]
    """For rows with more; empty in a decode step."""
    lens_T: IntArray
    """How many tokens each token's row has in the step; 0: it is of no row."""
    rows: tuple[IntArray, ...]
    """First token of each row, and the end; tokens in the cache before; tables, one after another,
    in whole tiles of keys."""
    key_tiles: int = field(metadata={"static": True})
    """Tiles of keys in each table."""
    blocks: int = field(metadata={"static": True})
    """KV blocks in a tile of keys."""


def make_plan(batch: Batch, need: AttentionNeed, tiles: Tiles) -> Plan:
    """The plan of a batch, padded or not. Raises UnsupportedError if its lists are too long."""
    num_rows, width = batch.block_tables.shape
    key_tiles = -(-width // tiles.blocks)
    tables = padded(padded(batch.block_tables, num_rows + 1), key_tiles * tiles.blocks, axis=1)
    starts = np.append(batch.query_starts, batch.query_starts[-1])
    rows = (starts, padded(batch.context_lens, num_rows + 1), tables.ravel())

    def attend(chosen: Any, tile: int, num_tiles: int) -> dict[int, Work]:
        works = {}
        for window in sorted({spec.window or 0 for spec in need.specs}):
            size = tiles.blocks * need.block_size
            most = min(key_tiles, (window + tile - 3) // size + 2) if window else key_tiles
            lists = _meetings(batch, np.flatnonzero(chosen), tile, size, window)
            works[window] = _work(lists, num_tiles * most, tile)
            _check((*works[window].lists, *rows))
        return works

    is_decode = batch.num_tokens == num_rows
    num_tiles = -(-batch.num_tokens // tiles.queries) + min(num_rows, batch.num_tokens // 2)
    most_writes = -(-batch.num_tokens // tiles.positions) + 2 * num_rows
    return Plan(
        writes=_work(
            _places(batch, need.block_size, tiles.positions),
            min(batch.num_tokens, most_writes),
            tiles.positions,
        ),
        one=attend(batch.query_lens == 1, 1, num_rows),
        several={} if is_decode else attend(batch.query_lens > 1, tiles.queries, num_tiles),
        lens_T=padded(np.repeat(batch.query_lens, batch.query_lens), batch.num_tokens),
        rows=rows,
        key_tiles=key_tiles,
        blocks=tiles.blocks,
    )


def _places(batch: Batch, block_size: int, size: int) -> tuple[IntArray, ...]:
    """The tiles of the cache that the step's tokens go to."""
    before = batch.context_lens
    row, tile, low, high = _cut(np.arange(batch.num_rows), before, batch.sequence_lens, size)
    block, part = np.divmod(tile, block_size // size)
    token = batch.query_starts[row] + low - before[row]
    return batch.block_tables[row, block], part, token, low - tile * size, high - tile * size


def _meetings(
    batch: Batch, rows: Any, tile: int, key_tile: int, window: int
) -> tuple[IntArray, ...]:
    """Tiles of the rows' queries with the tiles of keys that some query of them sees."""
    starts = batch.query_starts
    row, query_tile, low, high = _cut(rows, starts[rows], starts[rows + 1], tile)
    shift = batch.context_lens[row] - starts[row]
    first = np.maximum(low + shift - window + 1, 0) if window else np.zeros_like(low)
    pair, keys, _, _ = _cut(np.arange(len(row)), first, high + shift, key_tile)
    if not len(pair):
        return (*np.array([[0], [batch.num_rows], [0]]),)
    return query_tile[pair], row[pair], keys


def _cut(owners: Any, starts: Any, ends: Any, size: int) -> tuple[Any, Any, Any, Any]:
    """Cut ranges at multiples of ``size``: the owner, number, start and end of each piece."""
    first = starts // size
    counts = np.where(ends > starts, -(-ends // size) - first, 0)
    index = np.repeat(np.arange(len(owners)), counts)
    tile = first[index] + np.arange(len(index)) - np.repeat(np.cumsum(counts) - counts, counts)
    low, high = np.maximum(starts[index], tile * size), np.minimum(ends[index], (tile + 1) * size)
    return owners[index], tile, low, high


def _work(lists: tuple[IntArray, ...], most: int, tile: int) -> Work:
    count = np.array(max(1, len(lists[0])), np.int32)
    filled = tuple(padded(entries.astype(np.int32), max(1, most)) for entries in lists)
    return Work(count=count, lists=filled, tile=tile)


def _check(lists: tuple[IntArray, ...]) -> None:
    if (taken := sum(entries.nbytes for entries in lists)) > _SMEM_BYTES:
        raise UnsupportedError(
            f"pallas attention: the block tables and lists of a step take {taken} bytes, and "
            f"{_SMEM_BYTES} of scalar memory are theirs; take a larger --block-size, or lower "
            "--max-model-len, --max-num-seqs or --max-num-batched-tokens"
        )
