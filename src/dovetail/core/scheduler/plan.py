"""A step in the making: who computes how much."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dovetail.core.batch import JoinedRow
from dovetail.core.types import IntArray

__all__ = ["Plan", "chunk"]

_NO_ROWS = np.zeros(0, np.int32)


@dataclass(kw_only=True)
class Plan:
    """Rows, and what has to happen before they compute."""

    rows: IntArray = field(default_factory=lambda: _NO_ROWS)
    grants: IntArray = field(default_factory=lambda: _NO_ROWS)
    """Tokens that each row computes."""
    joined: list[JoinedRow] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)
    """Pairs (from, to) of blocks."""


def chunk(wanted: int, left: int, *, may_split: bool) -> int:
    """How much of a prompt of ``wanted`` tokens to compute now, with ``left`` of the budget."""
    return min(wanted, left) if wanted <= left or may_split else 0
