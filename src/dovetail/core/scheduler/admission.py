"""Who of those that wait joins a step."""

from __future__ import annotations

import numpy as np

from dovetail.core.errors import RequestFailedError
from dovetail.core.request import Request
from dovetail.core.scheduler.blocks import Prefix, SequenceBlocks
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
        passed: list[Sequence] = []
        while left > 0 and self.table.num_vacant and (sequence := self.waiting.peek()):
            prefix = self.blocks.find_prefix(sequence)
            wanted = len(sequence.token_ids) - prefix.num_computed
            grant = chunk(wanted, left, may_split=self.config.enable_chunked_prefill)
            if grant and self._fits(sequence, prefix):
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

    def _fits(self, sequence: Sequence, prefix: Prefix) -> bool:
        """Whether there are blocks for what is known of it; if it is pinned, for all it can need.

        Pinned sequences that run never need more than the pool together, so that there is always
        somebody else to send back.
        """
        if prefix.num_needed + self.blocks.promised() > self.pool.num_free:
            return False
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
