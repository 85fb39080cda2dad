"""A step in the making: who computes how much."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dovetail.core.batch import JoinedRow
from dovetail.core.types import IndexArray, IntArray

__all__ = ["Plan", "chunk", "longest_first"]

_NO_ROWS = np.zeros(0, np.intp)
_NO_GRANTS = np.zeros(0, np.int32)


@dataclass(kw_only=True)
class Plan:
    """Rows, and what has to happen before they compute."""

    rows: IndexArray = field(default_factory=lambda: _NO_ROWS)
    grants: IntArray = field(default_factory=lambda: _NO_GRANTS)
    """Tokens that each row computes, drafts included."""
    drafts: IntArray | None = None
    """How many of the tokens of each row are drafts; rows that joined later have none."""
    ahead: IntArray | None = None
    """Drafts that the draft model may then make for each row, each of which needs a KV slot."""
    joined: list[JoinedRow] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Pairs (from, to) of blocks."""

    @property
    def reach(self) -> IntArray:
        """Positions that each row needs blocks for, beyond those that it has computed."""
        return self.grants if self.ahead is None else self.grants + self.ahead

    @property
    def only_decodes(self) -> bool:
        """Each row computes one token and has no drafts: what is said of one is said of all."""
        has_drafts = self.drafts is not None or self.ahead is not None
        return not has_drafts and bool((self.grants == 1).all())

    def padded(self, counts: IntArray | None) -> IntArray | None:
        """``drafts`` or ``ahead`` with zeros for the rows that joined later."""
        if counts is None or len(counts) == len(self.rows):
            return counts
        return np.concatenate([counts, np.zeros(len(self.rows) - len(counts), np.int32)])


def longest_first(lengths: IntArray) -> IndexArray:
    """(R,) in which order rows are attended best: what takes longest should not begin last.

    Graham's rule for jobs that several processors share (1969). Rows that grow by one token each
    keep their places.
    """
    return np.argsort(-lengths, kind="stable")


def chunk(wanted: int, left: int, *, may_split: bool) -> int:
    """How much of a prompt of ``wanted`` tokens to compute now, with ``left`` of the budget.

    One that does not end in this step leaves half of the budget to those behind it; what they do
    not use comes back to it in ``RunningRows.top_up``.
    """
    if wanted <= left:
        return wanted
    return (left + 1) // 2 if may_split else 0
