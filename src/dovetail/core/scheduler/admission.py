"""Who of those that wait joins a step."""

from __future__ import annotations

import numpy as np

from dovetail.core.scheduler.blocks import SequenceBlocks
from dovetail.core.scheduler.plan import Plan, chunk
from dovetail.core.scheduler.policy import WaitingQueue
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.scheduler.settings import SchedulerConfig, SchedulerStats

__all__ = ["Admission"]


class Admission:
    """Gives rows and first blocks to waiting sequences."""

    def __init__(
        self,
        config: SchedulerConfig,
        waiting: WaitingQueue,
        blocks: SequenceBlocks,
        stats: SchedulerStats,
    ) -> None:
        self.config = config
        self.waiting = waiting
        self.blocks = blocks
        self.table = blocks.table
        self.pool = blocks.pool
        self.stats = stats

    def admit(self, plan: Plan) -> None:
        """Add waiting sequences to ``plan`` while budget, rows and blocks last."""
        left = self.config.max_num_batched_tokens - int(plan.grants.sum())
        while left > 0 and self.table.num_vacant and (sequence := self.waiting.peek()):
            prefix = self.blocks.find_prefix(sequence)
            grant = chunk(
                len(sequence.token_ids) - prefix.num_computed,
                left,
                may_split=self.config.enable_chunked_prefill,
            )
            if prefix.num_needed > self.pool.num_free:
                runs = len(plan.rows) or len(self.table.order)
                if runs or not self._drop_shares_but(sequence):
                    return
                continue
            if not grant:
                return
            self.waiting.pop()
            self.join(plan, sequence, grant)
            left -= grant

    def join(self, plan: Plan, sequence: Sequence, grant: int) -> None:
        """Put a sequence that has left the queue into the step."""
        prefix = self.blocks.find_prefix(sequence)
        self.blocks.hold(sequence, prefix)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = prefix.num_computed
            self.stats.prefix_cache_queries += sequence.num_prompt_tokens
            self.stats.prefix_cache_hits += prefix.num_computed
        joined = self.table.join(sequence, prefix.num_computed)
        row, grants = np.array([joined.row], np.int32), np.array([grant], np.int32)
        plan.joined.append(joined)
        plan.copies += self.blocks.extend(row, grants)
        plan.rows = np.concatenate([plan.rows, row])
        plan.grants = np.concatenate([plan.grants, grants])

    def _drop_shares_but(self, keep: Sequence) -> bool:
        """Waiting forks may hold all blocks between them: let them go, they can be recomputed."""
        holders = [s for s in self.waiting if s.blocks and s is not keep]
        for sequence in holders:
            self.blocks.drop(sequence)
        return bool(holders)
