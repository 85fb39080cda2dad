"""Sequences of random queries, keys and values, taken through an attention backend in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dovetail.core.batch import Batch, SamplingBatch
from dovetail.core.buckets import Buckets, padded
from dovetail.core.conformance.numpy_ops import NUMPY_DTYPES, NumpyArray, dense_attention
from dovetail.core.contracts.attention import AttentionBackend, AttentionNeed, AttentionSpec
from dovetail.core.contracts.workbench import Workbench
from dovetail.core.types import IntArray

__all__ = ["Piece", "Sequences", "Sides", "Steps", "batch_of"]

_NONE = np.zeros(0, np.int32)
_VOID = 1e4
"""Queries, keys and values of the tokens that pad a step: large, so that they show."""


class Piece(NamedTuple):
    """What a step computes of one sequence."""

    sequence: int
    start: int
    length: int

    @property
    def decodes(self) -> bool:
        """One token behind others, as decoding gives."""
        return self.length == 1 and self.start > 0


class Sides(NamedTuple):
    """Queries, keys and values, of each sequence."""

    q: Sequence[NumpyArray]
    k: Sequence[NumpyArray]
    v: Sequence[NumpyArray]


Steps = list[list[Piece]]


def batch_of(pieces: Sequence[Piece], tables: IntArray, block_size: int) -> Batch:
    """The step that computes these pieces; nothing is sampled.

    Args:
        pieces: Of different sequences.
        tables: (S, M) the blocks of every sequence.
        block_size: Positions per block.
    """
    rows = np.array([piece.sequence for piece in pieces], np.intp)
    blocks = -(-max(piece.start + piece.length for piece in pieces) // block_size)
    reach = np.array([-(-(p.start + p.length) // block_size) for p in pieces])
    mine = tables[rows, :blocks]
    return Batch(
        step=1,
        rows=rows,
        query_lens=np.array([piece.length for piece in pieces], np.int32),
        context_lens=np.array([piece.start for piece in pieces], np.int32),
        block_tables=np.where(np.arange(blocks) < reach[:, None], mine, 0).astype(np.int32),
        token_ids=np.zeros(sum(piece.length for piece in pieces), np.int32),
        carried=np.zeros(0, np.intp),
        carried_rows=np.zeros(0, np.intp),
        sampled=np.zeros(0, np.intp),
        sampling=SamplingBatch.greedy(0),
        copies=np.zeros((0, 2), np.int32),
    )


@dataclass
class Sequences:
    """Sequences whose blocks are scattered and lie between those of the others.

    All blocks hold NaN at first, as requests before may have left them, and so do those of one more
    sequence, which none of the steps names.
    """

    spec: AttentionSpec
    need: AttentionNeed
    lengths: Sequence[int]
    mixed_batches: bool = True
    """Rows that decode may stand beside rows that do not."""
    buckets: Buckets | None = None
    """How steps are padded; None: not at all."""
    tables: IntArray = field(init=False)
    num_blocks: int = field(init=False)

    def __post_init__(self) -> None:
        random, spec = np.random.default_rng(len(self.lengths)), self.spec
        dtype = NUMPY_DTYPES[self.need.dtype]

        def draw(length: int, heads: int) -> NumpyArray:
            return random.standard_normal((length, heads, spec.head_size)).astype(dtype)

        self.sides = Sides(
            [draw(n, spec.num_heads) for n in self.lengths],
            [draw(n, spec.num_kv_heads) for n in self.lengths],
            [draw(n, spec.num_kv_heads) for n in self.lengths],
        )
        width = -(-max(self.lengths) // self.need.block_size)
        count = len(self.lengths) + 1
        numbers = random.permutation(count * width) + 1
        self.tables = numbers.reshape(count, width).astype(np.int32)
        self.num_blocks = numbers.size + 1

    def want(self) -> list[NumpyArray]:
        """What numpy gives every position, over keys and values as the cache keeps them."""
        stored = NUMPY_DTYPES.get(self.need.kv_dtype)

        def kept(x: NumpyArray) -> NumpyArray:
            return x if stored is None else x.astype(np.float32).astype(stored)

        return [
            dense_attention(q, kept(k), kept(v), self.spec)
            for q, k, v in zip(*self.sides, strict=True)
        ]

    def run(self, backend: AttentionBackend, bench: Workbench, steps: Steps) -> list[NumpyArray]:
        """What the backend gives every position, (L, H, E) of each sequence."""
        cache = self._left_behind(backend, bench)
        out = [np.full_like(q, np.nan) for q in self.sides.q]
        for pieces in self.allowed(steps):
            got, cache = self.attend(backend, bench, cache, pieces, self.sides)
            first = 0
            for number, start, count in pieces:
                out[number][start : start + count] = got[first : first + count]
                first += count
        return out

    def attend(
        self,
        backend: AttentionBackend,
        bench: Workbench,
        cache: Any,
        pieces: Sequence[Piece],
        sides: Sides,
        tables: IntArray | None = None,
    ) -> tuple[NumpyArray, Any]:
        """One step: the answers of its tokens, (T, H, E), and the cache.

        Args:
            backend: Writes and attends.
            bench: Of its platform.
            cache: Of the backend.
            pieces: What the step computes.
            sides: What they are cut from.
            tables: Blocks of every sequence; None: its own.
        """
        tables = self.tables if tables is None else tables
        batch = batch_of(pieces, tables, self.need.block_size)
        num_tokens = batch.num_tokens
        if self.buckets is not None:
            batch = self.buckets.pad(batch)
        q, k, v = (
            bench.put(_filled([side[i][a : a + n] for i, a, n in pieces], batch.num_tokens))
            for side in sides
        )
        plan = backend.plan(batch, self.need)
        got, cache = backend.attend(q, k, v, cache, plan, self.spec)
        return bench.get(got)[:num_tokens], cache

    def _left_behind(self, backend: AttentionBackend, bench: Workbench) -> Any:
        """A cache in which all blocks hold NaN, but for the first, which is nobody's."""
        cache = backend.allocate(self.spec, self.need, self.num_blocks)
        count, length = len(self.tables), self.tables.shape[1] * self.need.block_size
        wrong = Sides(
            *(
                [np.full((length, *side[0].shape[1:]), np.nan, side[0].dtype)] * count
                for side in self.sides
            )
        )
        most = length if self.buckets is None else min(length, self.buckets.tokens[-1])
        steps = [
            [Piece(i, start, min(most, length - start)) for i in range(count)]
            for start in range(0, length, most)
        ]
        for pieces in self.allowed(steps):
            _, cache = self.attend(backend, bench, cache, pieces, wrong)
        return cache

    def allowed(self, steps: Steps) -> Steps:
        """The steps, cut where rows must not stand together, or tokens are too many."""
        if not self.mixed_batches:
            steps = [
                [piece for piece in pieces if piece.decodes is kind]
                for pieces in steps
                for kind in (True, False)
            ]
        limit = None if self.buckets is None else self.buckets.tokens[-1]
        return [part for pieces in steps for part in _within(pieces, limit) if part]

    def whole(self) -> Steps:
        """Each sequence in one piece, all in one step."""
        return [[Piece(i, 0, n) for i, n in enumerate(self.lengths)]]

    def one_by_one(self, last: int = 4) -> Steps:
        """The last tokens of every sequence one at a time, as decoding does."""
        starts = [max(1, n - last) for n in self.lengths]
        steps = [[Piece(i, 0, a) for i, a in enumerate(starts)]]
        for step in range(last):
            left = zip(starts, self.lengths, strict=True)
            steps.append([Piece(i, a + step, 1) for i, (a, n) in enumerate(left) if a + step < n])
        return [pieces for pieces in steps if pieces]

    def mixed(self) -> Steps:
        """Pieces of different lengths, so that rows that decode stand beside rows that do not."""
        done, steps, random = [0] * len(self.lengths), [], np.random.default_rng(1)
        while any(a < n for a, n in zip(done, self.lengths, strict=True)):
            pieces = []
            for i in random.permutation(len(done)).tolist():
                count = min(int(random.choice([1, 1, 9, 40])), self.lengths[i] - done[i])
                if count and random.random() < 0.8:
                    pieces.append(Piece(i, done[i], count))
                    done[i] += count
            if pieces:
                steps.append(pieces)
        return steps


def _filled(parts: Sequence[NumpyArray], size: int) -> NumpyArray:
    """The parts one after another, and void tokens behind them."""
    joined = np.concatenate(parts)
    filled = padded(joined, size)
    filled[len(joined) :] = _VOID
    return filled


def _within(pieces: list[Piece], limit: int | None) -> Steps:
    """The pieces of one step, on several where they are more than ``limit`` tokens."""
    parts: Steps = [[]]
    for piece in pieces:
        used = sum(other.length for other in parts[-1])
        if limit is not None and used + piece.length > limit:
            parts.append([])
        parts[-1].append(piece)
    return parts
