"""The KV blocks of sequences: growing, sharing, copy-on-write, cached prefixes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from dovetail.core.batch import Batch
from dovetail.core.errors import InvariantError
from dovetail.core.kv.extent import blocks_for, most_blocks
from dovetail.core.kv.pool import BlockPool
from dovetail.core.kv.prefix import extend_chain
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.scheduler.settings import SchedulerConfig
from dovetail.core.types import BoolArray, IndexArray, IntArray

__all__ = ["Need", "Prefix", "SequenceBlocks"]


class Prefix:
    """What a waiting sequence can take over instead of computing it."""

    def __init__(self, num_computed: int, found: list[int], num_needed: int) -> None:
        self.num_computed = num_computed
        """Tokens that need not be computed."""
        self.found = found
        """Blocks of the prefix cache to share; the first may be 0, where nobody looks any more."""
        self.num_needed = num_needed
        """Free blocks that its known tokens need beyond these."""


class Need(NamedTuple):
    """Blocks that a step needs before it runs."""

    rows: IndexArray
    """Rows whose blocks do not reach far enough."""
    missing: IntArray
    """How many each of them needs."""
    flagged: list[int]
    """Rows that may have shared the block which they write next, before this step."""
    shared: list[int]
    """Those that do, and need a block of their own in place of one that others count on."""
    total: int


class SequenceBlocks:
    """Moves blocks between the pool, the sequences and their rows."""

    def __init__(self, pool: BlockPool, table: RowTable, config: SchedulerConfig) -> None:
        self.pool = pool
        self.table = table
        self.size = table.block_size
        self.prefix_caching = config.enable_prefix_caching
        self.window = config.window
        self.limit = most_blocks(
            config.max_model_len, self.size, config.window, config.max_num_batched_tokens
        )
        """The most blocks that one sequence holds."""

    def need(self, rows: IndexArray, grants: IntArray) -> Need:
        """The blocks that rows need to compute ``grants`` more tokens each."""
        table = self.table
        ends = table.num_computed[rows] + (grants + (self.size - 1))
        missing = ends // self.size - table.num_blocks[rows]
        short = (missing > 0).nonzero()[0]
        flags = table.shares_tail
        flagged = rows[flags[rows]].tolist() if np.count_nonzero(flags) else []
        shared = [row for row in flagged if self._shared_tail(row) is not None]
        missing = missing[short]
        return Need(rows[short], missing, flagged, shared, int(missing.sum()) + len(shared))

    def missing(self, rows: IndexArray, grants: IntArray) -> int:
        """How many blocks ``extend`` would take."""
        return self.need(rows, grants).total

    def extend(self, rows: IndexArray, grants: IntArray) -> list[tuple[int, int]]:
        """Give rows the blocks they are about to write; returns (from, to) copies to make first."""
        return self.give(self.need(rows, grants))

    def give(self, need: Need) -> list[tuple[int, int]]:
        """Fill a need that was found just now; see ``extend``."""
        copies = [self._own_tail(row) for row in need.shared]
        if need.flagged:
            self.table.shares_tail[need.flagged] = False
        fresh = self.pool.allocate(need.total - len(copies))
        if len(fresh) == len(need.rows):
            self.table.add_one_block_each(need.rows, fresh)
            return copies
        for row, count in zip(need.rows.tolist(), need.missing.tolist(), strict=True):
            self.table.add_blocks(row, fresh[:count])
            fresh = fresh[count:]
        return copies

    def _own_tail(self, row: int) -> tuple[int, int]:
        """Copy-on-write: others hold the block that the row writes next, so it gets its own."""
        sequence = self.table.at(row)
        index = int(self.table.num_computed[row]) // self.size
        shared = sequence.blocks[index]
        (own,) = self.pool.allocate(1)
        self.table.replace_block(row, sequence, index, own)
        self.pool.release([shared])
        return shared, own

    def _shared_tail(self, row: int) -> int | None:
        """Index of the block that the row writes next, if there is one and others hold it too.

        The prefix index counts as another: a parent may have filled the block and be gone.
        """
        index = int(self.table.num_computed[row]) // self.size
        blocks = self.table.at(row).blocks
        if index >= len(blocks):
            return None
        return index if self._has_others(blocks[index]) else None

    def _has_others(self, block: int) -> bool:
        """Whether anybody but its one holder counts on what is in the block."""
        return self.pool.references(block) > 1 or self.pool.name_of(block) is not None

    def promised(self) -> int:
        """Blocks that running rows will need for tokens which they have, but do not compute yet."""
        table, order = self.table, self.table.order
        whole = -(-table.num_tokens[order] // self.size)
        ends = np.minimum(whole, table.num_released[order] + self.limit)
        return int(np.maximum(ends - table.num_blocks[order], 0).sum())

    def room(self, row: int, grant: int) -> int:
        """Tokens beyond ``grant`` that the row could compute with all the blocks there are."""
        num_blocks = int(self.table.num_blocks[row]) + self.pool.num_free
        return num_blocks * self.size - int(self.table.num_computed[row]) - grant

    def most(self, total: int) -> int:
        """The most blocks that a sequence holds on its way to ``total`` tokens."""
        return min(blocks_for(total, self.size), self.limit)

    def release_behind(self) -> None:
        """Give back what no layer of a running sequence looks at any more.

        Steps under way may still read these blocks: they run before any step that writes them.
        """
        if self.window is None:
            return
        table, order = self.table, self.table.order
        done = np.minimum(table.num_computed[order], table.num_known[order])
        first = np.maximum(done - self.window, 0) // self.size
        late = first > table.num_released[order]
        for row, index in zip(order[late].tolist(), first[late].tolist(), strict=True):
            sequence = table.at(row)
            if self.prefix_caching:
                self._register(sequence, index * self.size)
            self.pool.release(sequence.blocks[sequence.num_released : index])
            table.release_blocks(row, sequence, index)

    def find_prefix(self, sequence: Sequence) -> Prefix:
        """What a waiting sequence may take over, leaving at least one token to compute."""
        num_known = len(sequence.token_ids)
        num_blocks = blocks_for(num_known, self.size)
        if sequence.num_shared_tokens:
            needed = num_blocks - len(sequence.blocks)
            index = sequence.num_shared_tokens // self.size
            if index < len(sequence.blocks):
                needed += self._has_others(sequence.blocks[index])
            return Prefix(sequence.num_shared_tokens, [], needed)
        found = self._find_cached(sequence)
        held = [block for block in found if block]
        revived = sum(map(self.pool.is_cached, held))
        needed = min(num_blocks - len(found) + len(held), self.limit) - len(held) + revived
        return Prefix(len(found) * self.size, found, needed)

    def _find_cached(self, sequence: Sequence) -> list[int]:
        """Blocks of the longest cached prefix; 0 for those that lie before its last window."""
        if not self.prefix_caching or sequence.request.params.prompt_logprobs is not None:
            return []
        extend_chain(sequence.chain, sequence.root, sequence.token_ids, self.size)
        digests = sequence.chain[: (len(sequence.token_ids) - 1) // self.size]
        if self.window is not None:
            return self._find_window(digests, self.window)
        found: list[int] = []
        for digest in digests:
            block = self.pool.find(digest)
            if block is None:
                break
            found.append(block)
        return found

    def _find_window(self, digests: list[bytes], window: int) -> list[int]:
        """The longest prefix whose last window is cached."""
        blocks = [self.pool.find(digest) or 0 for digest in digests]
        best, run = 0, 0
        for end, block in enumerate(blocks, 1):
            run = run + 1 if block else 0
            if run >= end - self._window_start(end, window):
                best = end
        start = self._window_start(best, window)
        return [0] * start + blocks[start:best]

    def _window_start(self, num_blocks: int, window: int) -> int:
        """The first block that is looked at from behind ``num_blocks`` full ones."""
        return max(num_blocks * self.size - window, 0) // self.size

    def hold(self, sequence: Sequence, prefix: Prefix) -> None:
        """Take over the prefix that ``find_prefix`` has just found."""
        released = prefix.found.count(0)
        self.pool.share(prefix.found[released:])
        sequence.blocks.extend(prefix.found)
        sequence.num_released = max(sequence.num_released, released)
        sequence.num_registered = prefix.num_computed // self.size

    def drop(self, sequence: Sequence) -> None:
        """Let go of all blocks of a sequence that has no row."""
        self.pool.release(sequence.held)
        sequence.blocks = []
        sequence.num_released = 0
        sequence.num_shared_tokens = 0
        sequence.num_registered = 0

    def drop_shares(self, waiting: Iterable[Sequence]) -> bool:
        """Let go of what waiting forks hold: it can be computed again. False: they held nothing."""
        holders = [sequence for sequence in waiting if sequence.blocks]
        for sequence in holders:
            self.drop(sequence)
        return bool(holders)

    def register_prompts(self, batch: Batch, live: BoolArray) -> None:
        """Enter the blocks that a finished step filled with prompt tokens into the prefix index.

        Blocks that decode fills are entered when their sequence leaves its row: nobody waits for
        them, and naming them here would hold up everybody's step. ``live`` is (R,).
        """
        if not self.prefix_caching:
            return
        filled = (batch.query_lens > 1) & live
        if batch.num_drafts is not None:
            filled[batch.sampled[batch.num_drafts > 0]] = False
        for i in np.flatnonzero(filled).tolist():
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
        for index in range(max(sequence.num_registered, sequence.num_released), full):
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
        child.num_released = parent.num_released
        self.pool.share(child.held)
        self.table.shares_tail[parent.row] = True
