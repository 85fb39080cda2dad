"""Where in a text a few tokens have occurred before: the index that host proposers share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

__all__ = ["Occurrences"]

_MOST_REMEMBERED = 32
"""Occurrences kept of one gram, the latest ones: a proposer looks at no more."""


class Occurrences:
    """A growing list of tokens in which every run of ``gram`` tokens can be found at once.

    Appending and looking up take constant time per token.
    """

    __slots__ = ("_ends", "gram", "tokens")

    def __init__(self, gram: int) -> None:
        self.gram = gram
        self.tokens: list[int] = []
        self._ends: dict[tuple[int, ...], list[int]] = {}
        """Positions right after each gram, ascending."""

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens."""
        mine, gram, ends = self.tokens, self.gram, self._ends
        for token in tokens:
            mine.append(token)
            end = len(mine)
            if end < gram:
                continue
            known = ends.setdefault(tuple(mine[end - gram :]), [])
            known.append(end)
            if len(known) > 2 * _MOST_REMEMBERED:
                del known[:_MOST_REMEMBERED]

    def after(self, context: list[int]) -> Iterator[int]:
        """Positions that follow an earlier occurrence of the context's last gram, latest first.

        What comes right after the end of this text is not known, so the end is left out.
        """
        if len(context) < self.gram:
            return
        last = len(self.tokens)
        found = self._ends.get(tuple(context[len(context) - self.gram :]), ())
        for end in found[: -_MOST_REMEMBERED - 1 : -1]:
            if end != last:
                yield end

    def agreement(self, end: int, context: list[int], most: int) -> int:
        """How many tokens before ``end`` agree with the end of ``context``, up to ``most``."""
        mine, size = self.tokens, len(context)
        most = min(most, end, size)
        count = self.gram
        while count < most and mine[end - count - 1] == context[size - count - 1]:
            count += 1
        return count
