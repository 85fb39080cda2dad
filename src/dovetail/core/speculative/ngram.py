"""Prompt lookup: what followed the last tokens when they occurred before in the same sequence.

Source: Saxena, "Prompt Lookup Decoding", 2023.
"""

from __future__ import annotations

from dovetail.core.speculative.occurrences import Occurrences
from dovetail.core.types import IntArray

__all__ = ["NgramProposer"]


class NgramProposer:
    """Continues as after the latest of the longest agreeing occurrences.

    Args:
        shortest: Tokens that must agree.
        longest: Tokens that are compared at most.
    """

    def __init__(self, shortest: int, longest: int) -> None:
        self._shortest = shortest
        self._longest = longest
        self._rows: dict[int, tuple[int, Occurrences]] = {}

    def propose(self, row: int, epoch: int, salt: str, known: IntArray, count: int) -> list[int]:
        """See ``Proposer``. Looks at the sequence itself only."""
        text = self._text(row, epoch)
        text.extend(known[len(text.tokens) :].tolist())
        best, where = 0, 0
        for end in text.after(text.tokens):
            agreement = text.agreement(end, text.tokens, self._longest)
            if agreement > best:
                best, where = agreement, end
                if best == self._longest:
                    break
        return _continue(text.tokens, where, count) if best else []

    def _text(self, row: int, epoch: int) -> Occurrences:
        kept = self._rows.get(row)
        if kept is None or kept[0] != epoch:
            kept = self._rows[row] = (epoch, Occurrences(self._shortest))
        return kept[1]


def _continue(tokens: list[int], start: int, count: int) -> list[int]:
    """Tokens from ``start``; past the end they go on with the period that the match implies."""
    found = tokens[start : start + count]
    while len(found) < count:
        found.append(found[len(found) - (len(tokens) - start)])
    return found
