"""Padding steps to a few sizes, for devices that compile each shape."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dovetail.core.batch import Batch

__all__ = ["Buckets", "StepShape", "doubling", "pad_to", "padded"]


class StepShape(NamedTuple):
    """The sizes of a padded step."""

    num_tokens: int
    """T"""
    num_rows: int
    """R"""
    num_blocks: int
    """M, the width of the block tables."""

    @property
    def is_decode(self) -> bool:
        """Token i is the one token of row i, or of no row."""
        return self.num_tokens == self.num_rows


@dataclass(frozen=True, kw_only=True)
class Buckets:
    """The sizes that steps may have, each tuple ascending.

    A step in which every row has one token (decode) is padded in rows and tokens alike. Any other
    is padded in tokens, and has as many rows as there are at most.
    """

    decode: tuple[int, ...]
    """Rows of a decode step; the last is the most rows that there can be."""
    tokens: tuple[int, ...]
    """Tokens of any other step; the last is the most tokens of a step."""
    blocks: tuple[int, ...]
    """Widths of block tables; the last holds the longest sequence."""

    def shape_of(self, batch: Batch) -> StepShape:
        """The shape that the batch is padded to."""
        num_blocks = self._fitting(self.blocks, batch.block_tables.shape[1])
        if batch.num_tokens == batch.num_rows:
            rows = self._fitting(self.decode, batch.num_rows)
            return StepShape(rows, rows, num_blocks)
        return self._mixed(self._fitting(self.tokens, batch.num_tokens), num_blocks)

    def shapes(self) -> Iterator[StepShape]:
        """Every shape that ``shape_of`` can give: those that a warm-up goes through."""
        for num_blocks in self.blocks:
            yield from (StepShape(rows, rows, num_blocks) for rows in self.decode)
            yield from (self._mixed(tokens, num_blocks) for tokens in self.tokens)

    def pad(self, batch: Batch) -> Batch:
        """The batch in one of these sizes. Only T, R and M change: S, G and copies do not."""
        return pad_to(batch, self.shape_of(batch))

    def _mixed(self, num_tokens: int, num_blocks: int) -> StepShape:
        # A step of as many tokens as rows would be taken for a decode step.
        return StepShape(num_tokens, min(self.decode[-1], num_tokens - 1), num_blocks)

    @staticmethod
    def _fitting(sizes: tuple[int, ...], size: int) -> int:
        index = bisect_left(sizes, size)
        if index == len(sizes):
            raise ValueError(f"a step of size {size} does not fit in {sizes}")
        return sizes[index]


def pad_to(batch: Batch, shape: StepShape) -> Batch:
    """The batch in a shape that has room for it."""
    num_tokens, num_rows, num_blocks = shape
    return replace(
        batch,
        rows=padded(batch.rows, num_rows),
        query_lens=padded(batch.query_lens, num_rows),
        context_lens=padded(batch.context_lens, num_rows),
        block_tables=padded(padded(batch.block_tables, num_rows), num_blocks, axis=1),
        token_ids=padded(batch.token_ids, num_tokens),
        num_padding=num_tokens - batch.num_tokens + batch.num_padding,
    )


def doubling(smallest: int, largest: int) -> tuple[int, ...]:
    """Sizes that double from ``smallest``, at least 1, up to ``largest``, which is one of them."""
    sizes = []
    while smallest < largest:
        sizes.append(smallest)
        smallest *= 2
    return (*sizes, largest)


def padded(array: npt.NDArray[Any], size: int, axis: int = 0) -> npt.NDArray[Any]:
    """The array with zeros behind it along an axis, up to ``size``."""
    count = array.shape[axis]
    if count == size:
        return array
    shape = list(array.shape)
    shape[axis] = size
    out = np.zeros(shape, array.dtype)
    out[(slice(None),) * axis + (slice(count),)] = array
    return out
