"""What the rows compute that are running: decode, drafts, and prompts in parts."""

from __future__ import annotations

from functools import partial

import numpy as np

from dovetail.core.scheduler.blocks import SequenceBlocks
from dovetail.core.scheduler.plan import Plan, chunk
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.settings import SchedulerConfig
from dovetail.core.speculative.speculation import Speculation

__all__ = ["RunningRows"]


class RunningRows:
    """Shares the budget of a step among the rows that have a claim to it.

    Args:
        config: The limits.
        table: The rows; drafts are written there.
        blocks: Their blocks.
        speculation: Where drafts come from, if there are any.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        table: RowTable,
        blocks: SequenceBlocks,
        speculation: Speculation | None,
    ) -> None:
        self.config = config
        self.table = table
        self.blocks = blocks
        self.speculation = speculation
        self._chunk = partial(chunk, may_split=config.enable_chunked_prefill)

    def grant(self, decode: bool, prefill: bool, *, ahead: bool, may_draft: bool = True) -> Plan:
        """Running rows that compute something, and how many tokens each.

        Args:
            decode: Rows that go on with one token may.
            prefill: Rows that have several tokens to compute may.
            ahead: Steps are under way, so that some tokens are not known yet.
            may_draft: Rows may have drafts.
        """
        table, order = self.table, self.table.order
        num_tokens = table.num_tokens[order]
        wanted = num_tokens - table.num_computed[order]
        wanted[num_tokens >= table.total[order]] = 0
        drafting = self.speculation if may_draft and decode else None
        if drafting is not None and not drafting.begin(int(np.count_nonzero(wanted == 1))):
            drafting = None
        if ahead:
            waits = table.needs_known[order]
            if drafting is not None:
                waits = waits | table.may_draft[order]
            wanted[waits & (num_tokens > table.num_known[order])] = 0
        grants = np.where(wanted == 1, 1 if decode else 0, 0).astype(np.int32)
        left = self.config.max_num_batched_tokens - int(grants.sum())
        drafts = None
        if drafting is not None:
            drafts = drafting.propose(order, grants == 1, left)
            grants += drafts
            left -= int(drafts.sum())
        long = wanted > 1
        if prefill and long.any():
            for i in np.flatnonzero(long).tolist():
                grants[i] = self._chunk(int(wanted[i]), left)
                left -= int(grants[i])
        busy = grants > 0
        if not busy.all():
            order, grants = order[busy], grants[busy]
            drafts = None if drafts is None else drafts[busy]
        plan = Plan(rows=order, grants=grants)
        if drafts is not None and drafting is not None:
            plan.drafts = drafts if drafts.any() else None
            plan.ahead = drafting.ahead(order, table.num_computed[order] + grants, drafts)
        return plan

    def top_up(self, plan: Plan, left: int) -> None:
        """Give the budget that is left to the prompts that want more, as far as blocks last."""
        is_decode = self.config.max_num_batched_tokens - left == len(plan.rows)
        if left <= 0 or is_decode or not self.config.enable_chunked_prefill:
            return
        table = self.table
        wanted = table.num_known[plan.rows] - table.num_computed[plan.rows] - plan.grants
        for i in np.flatnonzero((plan.grants > 1) & (wanted > 0)).tolist():
            row, extra = plan.rows[i : i + 1], min(int(wanted[i]), left)
            extra = min(extra, self.blocks.room(int(row[0]), int(plan.grants[i])))
            plan.grants[i] += extra
            plan.copies += self.blocks.extend(row, plan.grants[i : i + 1])
            left -= extra
