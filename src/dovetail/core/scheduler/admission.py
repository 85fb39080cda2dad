"""Who of those that wait joins a step."""

from __future__ import annotations

import numpy as np

from dovetail.core.errors import RequestFailedError
from dovetail.core.request import Request
from dovetail.core.scheduler.blocks import SequenceBlocks
from dovetail.core.scheduler.plan import Plan, chunk
from dovetail.core.scheduler.prepared import PreparedQueue
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.scheduler.settings import SchedulerConfig, SchedulerStats

__all__ = ["Admission"]

_LOOK_AHEAD = 8
"""Sequences that do not fit and are looked past in one step."""


class Admission:
    """Gives rows and first blocks to waiting sequences."""

    def __init__(
        self,
        config: SchedulerConfig,
        waiting: PreparedQueue,
        blocks: SequenceBlocks,
        stats: SchedulerStats,
    ) -> None:
        self.config = config
        self.waiting = waiting
        self.blocks = blocks
        self.table = blocks.table
        self.pool = blocks.pool
        self.stats = stats
        self._stuck: tuple[int, int] | None = None
        """What ``_state`` was when nobody had the blocks to join; None if somebody had."""

    def check_fit(self, request: Request) -> None:
        """Raise RequestFailedError if a request can never be served, however long it waits."""
        total = len(request.prompt_token_ids) + (request.params.max_tokens or 0)
        needed, num_usable = self.blocks.most(total), self.pool.num_usable
        if total > self.config.max_model_len or needed > num_usable:
            raise RequestFailedError(
                f"{total} tokens need {needed} KV blocks of {self.config.block_size}; there are"
                f" {num_usable}, and a sequence may have {self.config.max_model_len} tokens"
            )

    def admit(self, plan: Plan) -> int:
        """Add waiting sequences to ``plan`` while budget, rows and blocks last.

        Returns the tokens of the budget that are left.

        In the order of the queue; but one that does not fit now may be passed by up to
        ``config.max_bypasses`` others in all, if it never ran.
        """
        left = self.config.max_num_batched_tokens - int(plan.grants.sum())
        if left > 0 and self.table.num_vacant and len(self.waiting) and not self._is_stuck():
            return self._admit(plan, left)
        return left

    def _admit(self, plan: Plan, left: int) -> int:
        passed: list[Sequence] = []
        self._stuck = self._state()
        while left > 0 and self.table.num_vacant and (sequence := self.waiting.peek()):
            prefix = self.blocks.find_prefix(sequence)
            wanted = len(sequence.token_ids) - prefix.num_computed
            grant = chunk(wanted, left, may_split=self.config.enable_chunked_prefill)
            has_blocks = prefix.num_needed <= self._state()[0]
            if has_blocks:
                self._stuck = None
            if grant and has_blocks and self._may_stay(sequence):
                self.join(plan, sequence, grant)
                left -= grant
                for other in passed:
                    other.num_bypasses += 1
                if not all(map(self._may_be_passed, passed)):
                    break
            elif not passed and not len(self.table.order) and self.blocks.drop_shares(self.waiting):
                continue
            elif self._may_be_passed(sequence) and len(passed) < _LOOK_AHEAD:
                self.waiting.remove(sequence)
                passed.append(sequence)
            else:
                break
        for sequence in passed:
            self.waiting.push(sequence)
        return left

    def _is_stuck(self) -> bool:
        """Whether at the last look nobody had the blocks to join, and nobody can have them now.

        What was cached meanwhile is not looked at: it counts once a block is free or one arrives.
        """
        if self._stuck is None or not len(self.table.order):
            return False
        num_free, num_waiting = self._state()
        return num_free <= self._stuck[0] and num_waiting == self._stuck[1]

    def _state(self) -> tuple[int, int]:
        """Free blocks that nobody was promised, and how many wait."""
        return self.pool.num_free - self.blocks.promised(), len(self.waiting)

    def _may_stay(self, sequence: Sequence) -> bool:
        """Whether a pinned sequence can have all the blocks that it will ever need.

        Pinned sequences that run never need more than the pool together, so that there is always
        somebody else to send back.
        """
        if not self.is_pinned(sequence):
            return True
        running = (self.table.at(row) for row in self.table.order.tolist())
        totals = [other.total for other in running if self.is_pinned(other)]
        return sum(map(self.blocks.most, [*totals, sequence.total])) <= self.pool.num_usable

    def is_pinned(self, sequence: Sequence) -> bool:
        """Whether it was sent back so often that it must run to its end once it runs again."""
        return sequence.num_preemptions >= self.config.max_preemptions

    def _may_be_passed(self, sequence: Sequence) -> bool:
        return not sequence.num_preemptions and sequence.num_bypasses < self.config.max_bypasses

    def join(self, plan: Plan, sequence: Sequence, grant: int) -> None:
        """Move a sequence from the queue into the step."""
        self.waiting.remove(sequence)
        prefix = self.blocks.find_prefix(sequence)
        self.blocks.hold(sequence, prefix)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = prefix.num_computed
            self.stats.prefix_cache_queries += sequence.num_prompt_tokens
            self.stats.prefix_cache_hits += prefix.num_computed
        joined = self.table.join(sequence, prefix.num_computed)
        row, grants = np.array([joined.row], np.intp), np.array([grant], np.int32)
        plan.joined.append(joined)
        plan.copies += self.blocks.extend(row, grants)
        plan.rows = np.concatenate([plan.rows, row])
        plan.grants = np.concatenate([plan.grants, grants])
