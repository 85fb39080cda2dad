"""Which tokens end the sequence of a row."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dovetail.core.types import BoolArray, IndexArray, IntArray

__all__ = ["StopTokens"]

_NO_TOKEN = -1
_MOST_COLUMNS = 4
"""Rows with more stop tokens than this are looked at one by one, and cost nobody else."""


class StopTokens:
    """The stop tokens of each row: columns that are compared for all rows at once.

    There are as many columns as some row has needed, for each costs every step.
    """

    def __init__(self, num_rows: int) -> None:
        self._columns = [np.full(num_rows, _NO_TOKEN, np.int32)]
        self._many: dict[int, tuple[int, ...]] = {}

    def set(self, row: int, tokens: Sequence[int]) -> None:
        """Give a row its stop tokens, in place of those it had."""
        self._many.pop(row, None)
        if len(tokens) > _MOST_COLUMNS:
            self._many[row], tokens = tuple(tokens), ()
        while len(self._columns) < len(tokens):
            self._columns.append(np.full_like(self._columns[0], _NO_TOKEN))
        for index, column in enumerate(self._columns):
            column[row] = tokens[index] if index < len(tokens) else _NO_TOKEN

    def found(self, rows: IndexArray, tokens: IntArray) -> BoolArray:
        """Whether tokens, (n, ...), end the sequences of their rows, (n,). Shaped as the tokens."""
        shape = (len(rows),) + (1,) * (tokens.ndim - 1)
        found: BoolArray = self._columns[0][rows].reshape(shape) == tokens
        for column in self._columns[1:]:
            found |= column[rows].reshape(shape) == tokens
        for row, stops in self._many.items():
            where = rows == row
            found[where] = np.isin(tokens[where], stops)
        return found
