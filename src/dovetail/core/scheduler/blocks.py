"""The KV blocks of sequences: growing, sharing, copy-on-write, cached prefixes."""

from __future__ import annotations

import numpy as np

from dovetail.core.batch import Batch
from dovetail.core.errors import InvariantError
from dovetail.core.kv.pool import BlockPool
from dovetail.core.kv.prefix import extend_chain
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.types import BoolArray, IntArray

__all__ = ["Prefix", "SequenceBlocks"]


class Prefix:
    """What a waiting sequence can take over instead of computing it."""

    def __init__(self, num_computed: int, found: list[int], num_needed: int) -> None:
        self.num_computed = num_computed
        """Tokens that need not be computed."""
        self.found = found
        """Blocks of the prefix cache to share."""
        self.num_needed = num_needed
        """Free blocks that its known tokens need beyond these."""


class SequenceBlocks:
    """Moves blocks between the pool, the sequences and their rows."""

    def __init__(self, pool: BlockPool, table: RowTable, *, prefix_caching: bool) -> None:
        self.pool = pool
        self.table = table
        self.size = table.block_size
        self.prefix_caching = prefix_caching

    def missing(self, rows: IntArray, grants: IntArray) -> int:
        """Blocks that rows need to compute ``grants`` more tokens each; no fewer than it takes."""
        shared = int(self.table.shares_tail[rows].sum())
        return int(np.maximum(self._missing_each(rows, grants), 0).sum()) + shared

    def _missing_each(self, rows: IntArray, grants: IntArray) -> IntArray:
        ends = self.table.num_computed[rows] + grants
        missing: IntArray = -(-ends // self.size) - self.table.num_blocks[rows]
        return missing

    def extend(self, rows: IntArray, grants: IntArray) -> list[tuple[int, int]]:
        """Give rows the blocks they are about to write; returns (from, to) copies to make first."""
        copies = [self._own_tail(int(row)) for row in rows[self.table.shares_tail[rows]]]
        missing = self._missing_each(rows, grants)
        short = missing > 0
        rows, missing = rows[short], missing[short]
        fresh = self.pool.allocate(int(missing.sum()))
        if len(fresh) == len(rows):
            self.table.add_one_block_each(rows, fresh)
        else:
            for row, count in zip(rows.tolist(), missing.tolist(), strict=True):
                self.table.add_blocks(row, fresh[:count])
                fresh = fresh[count:]
        return [copy for copy in copies if copy is not None]

    def _own_tail(self, row: int) -> tuple[int, int] | None:
        """Copy-on-write: if others hold the block that the row writes next, give it its own."""
        self.table.shares_tail[row] = False
        index = int(self.table.num_computed[row]) // self.size
        sequence = self.table.at(row)
        if index >= len(sequence.blocks) or self.pool.references(sequence.blocks[index]) == 1:
            return None
        shared = sequence.blocks[index]
        (own,) = self.pool.allocate(1)
        self.table.replace_block(row, sequence, index, own)
        self.pool.release([shared])
        return shared, own

    def find_prefix(self, sequence: Sequence) -> Prefix:
        """What a waiting sequence may take over, leaving at least one token to compute."""
        num_known = len(sequence.token_ids)
        num_blocks = -(-num_known // self.size)
        if sequence.num_shared_tokens:
            needed = num_blocks - len(sequence.blocks) + 1
            return Prefix(sequence.num_shared_tokens, [], needed)
        found = self._find_cached(sequence)
        revived = sum(self.pool.is_cached(block) for block in found)
        return Prefix(len(found) * self.size, found, num_blocks - len(found) + revived)

    def _find_cached(self, sequence: Sequence) -> list[int]:
        if not self.prefix_caching or sequence.request.params.prompt_logprobs is not None:
            return []
        extend_chain(sequence.chain, sequence.root, sequence.token_ids, self.size)
        found: list[int] = []
        for digest in sequence.chain[: (len(sequence.token_ids) - 1) // self.size]:
            block = self.pool.find(digest)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, sequence: Sequence, prefix: Prefix) -> None:
        """Take over the prefix that ``find_prefix`` has just found."""
        self.pool.share(prefix.found)
        sequence.blocks.extend(prefix.found)
        sequence.num_registered = prefix.num_computed // self.size

    def drop(self, sequence: Sequence) -> None:
        """Let go of all blocks of a sequence that has no row."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.num_shared_tokens = 0
        sequence.num_registered = 0

    def register_prompts(self, batch: Batch, live: BoolArray) -> None:
        """Enter the blocks that a finished step filled with prompt tokens into the prefix index.

        Blocks that decode fills are entered when their sequence leaves its row: nobody waits for
        them, and naming them here would hold up everybody's step. ``live`` is (R,).
        """
        if not self.prefix_caching:
            return
        for i in np.flatnonzero((batch.query_lens > 1) & live).tolist():
            sequence = self.table.at(int(batch.rows[i]))
            self._register(sequence, int(batch.sequence_lens[i]))

    def register_all(self, sequence: Sequence) -> None:
        """Enter every full block of a running sequence into the prefix index."""
        if self.prefix_caching and sequence.row is not None:
            row = sequence.row
            self._register(
                sequence, min(int(self.table.num_computed[row]), int(self.table.num_known[row]))
            )

    def _register(self, sequence: Sequence, num_tokens: int) -> None:
        full = num_tokens // self.size
        if sequence.row is None or full <= sequence.num_registered:
            return
        known = self.table.tokens[sequence.row, : full * self.size]
        extend_chain(sequence.chain, sequence.root, known, self.size)
        for index in range(sequence.num_registered, full):
            self.pool.register(sequence.blocks[index], sequence.chain[index])
        sequence.num_registered = full

    def fork(self, parent: Sequence, child: Sequence, num_shared: int) -> None:
        """Share the parent's first ``num_shared`` tokens with a child that has no blocks.

        They must be computed, and be the child's first tokens too, but not all that it has. Full
        blocks are shared for good; whoever writes first to one that is not full copies it.
        """
        if child.blocks or parent.row is None:
            raise InvariantError("engine", "only a running parent and a fresh child can fork")
        child.blocks = parent.blocks[: -(-num_shared // self.size)]
        child.num_shared_tokens = num_shared
        child.chain = parent.chain[: num_shared // self.size]
        self.pool.share(child.blocks)
        self.table.shares_tail[parent.row] = True
