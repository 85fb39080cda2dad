"""In which sizes a device computes: as they come, or padded to a few that it has compiled."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from dovetail.core.batch import Batch, SamplingBatch
from dovetail.core.buckets import Buckets, StepShape, pad_to, padded
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.types import IntArray

__all__ = ["FreeShapes", "PaddedShapes", "Shapes", "rehearsal"]

_PAIRS = 8
"""KV blocks that are copied at a time where shapes are static."""
_LEAST_LOGIT_ROWS = 16
"""Rows of logits that a step with prompts makes at a time, unless it has fewer tokens."""

Index = npt.NDArray[np.integer[Any]]


class Shapes(Protocol):
    """What the runner asks before it gives arrays to the device."""

    def step(self, batch: Batch) -> Batch:
        """The batch as the device is to compute it."""
        ...

    def logit_rows(
        self, index: Index, batch: Batch, most: int | None = None
    ) -> Iterator[tuple[Index, int]]:
        """The tokens whose logits are made, in the groups that are made at once.

        Args:
            index: (N,) into the T tokens.
            batch: As ``step`` gave it.
            most: How many at a time bound the memory; None if all fit.

        Yields:
            Indices into the T tokens, and how many of them are meant: those behind only pad.
        """
        ...

    def copies(self, pairs: IntArray) -> Iterator[IntArray]:
        """Pairs (n, 2) of KV blocks, in the groups that are copied at once."""
        ...

    def rehearsals(self) -> Iterator[tuple[str, Batch]]:
        """Steps that a warm-up goes through, by name, as ``step`` would give them.

        They write to block 0, which only pads.
        """
        ...


class FreeShapes:
    """Every size is as good as any other."""

    def step(self, batch: Batch) -> Batch:
        """As it is."""
        return batch

    def logit_rows(
        self, index: Index, batch: Batch, most: int | None = None
    ) -> Iterator[tuple[Index, int]]:
        """As many at once as there may be."""
        size = most or max(len(index), 1)
        for start in range(0, len(index), size):
            part = index[start : start + size]
            yield part, len(part)

    def copies(self, pairs: IntArray) -> Iterator[IntArray]:
        """All at once."""
        if len(pairs):
            yield pairs

    def rehearsals(self) -> Iterator[tuple[str, Batch]]:
        """A short prompt and a token after it: kernels and threads are set up on first use."""
        yield "prefill", rehearsal(0, 8, 8)
        yield "decode", rehearsal(8, 1, 9)


class PaddedShapes:
    """A few sizes, each of which is compiled once.

    Args:
        buckets: The sizes of steps.
        config: Its rows and drafts bound how many logits a step needs.
    """

    def __init__(self, buckets: Buckets, config: RunnerConfig) -> None:
        self._buckets = buckets
        wanted = config.max_num_seqs * (1 + config.max_drafts)
        self._most_logits = max(wanted, _LEAST_LOGIT_ROWS)

    def step(self, batch: Batch) -> Batch:
        """Padded in tokens, rows and blocks."""
        return self._buckets.pad(batch)

    def logit_rows(
        self, index: Index, batch: Batch, most: int | None = None
    ) -> Iterator[tuple[Index, int]]:
        """One number of rows for each shape of a step; ``most`` is not asked."""
        size = min(batch.num_tokens, self._most_logits)
        if batch.num_tokens == batch.num_rows:
            size = batch.num_rows
        for start in range(0, len(index), size):
            part = index[start : start + size]
            yield padded(part, size), len(part)

    def copies(self, pairs: IntArray) -> Iterator[IntArray]:
        """A few at a time, in their order; block 0 is copied onto itself to fill up."""
        for start in range(0, len(pairs), _PAIRS):
            yield padded(pairs[start : start + _PAIRS], _PAIRS)

    def rehearsals(self) -> Iterator[tuple[str, Batch]]:
        """Every shape that a step can have."""
        for shape in self._buckets.shapes():
            count = 1 if shape.is_decode else 2
            batch = pad_to(rehearsal(0, count, min(count, shape.num_blocks)), shape)
            yield _name(shape), replace(batch, copies=np.zeros((1, 2), np.int32))


def _name(shape: StepShape) -> str:
    what = f"{shape.num_rows} rows" if shape.is_decode else f"{shape.num_tokens} tokens"
    return f"{what}, {shape.num_blocks} blocks"


def rehearsal(num_context: int, num_tokens: int, num_blocks: int) -> Batch:
    """A step of one row, all of whose blocks are block 0."""
    row = np.zeros(1, np.intp)
    return Batch(
        step=0,
        rows=row,
        query_lens=np.array([num_tokens], np.int32),
        context_lens=np.array([num_context], np.int32),
        block_tables=np.zeros((1, num_blocks), np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
        carried=row[:0],
        carried_rows=row[:0],
        sampled=row,
        sampling=SamplingBatch.greedy(1),
        copies=np.zeros((0, 2), np.int32),
    )
