"""Suffix decoding: what followed the last tokens before, here and in earlier answers, by frequency.

Source: Oliaro et al., "SuffixDecoding: Extreme Speculative Decoding for Emerging AI Applications",
2024 (arXiv 2411.04975). The number of drafts follows the length of the match and the agreement of
its continuations, so that a poor match costs little. Occurrences are found through an index of
short grams in place of a suffix tree.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from dovetail.core.speculative.occurrences import Occurrences
from dovetail.core.types import IntArray

__all__ = ["SuffixProposer"]

_GRAM = 2
_LENGTHS_TRIED = 4
"""Lengths of match that are tried, the longest ones: shorter ones have more continuations."""
_MOST_SALTS = 64


@dataclass
class _Row:
    epoch: int
    salt: str
    text: Occurrences


class SuffixProposer:
    """Continues along the likeliest path of what followed.

    Args:
        longest: Tokens of context that are compared at most.
        drafts_per_match: Most drafts for each token that agrees.
        least_share: A token is drafted while its estimated probability is at least this.
        memory: Tokens of earlier sequences that are kept for each salt.
    """

    def __init__(
        self, *, longest: int, drafts_per_match: float, least_share: float, memory: int
    ) -> None:
        self._longest = longest
        self._drafts_per_match = drafts_per_match
        self._least_share = least_share
        self._memory = memory
        self._rows: dict[int, _Row] = {}
        self._history: OrderedDict[str, list[Occurrences]] = OrderedDict()
        """By salt: one or two texts of earlier sequences, each up to half of the memory."""

    def propose(self, row: int, epoch: int, salt: str, known: IntArray, count: int) -> list[int]:
        """See ``Proposer``. Looks at the sequence, and at earlier ones of the same salt."""
        mine = self._rows.get(row)
        if mine is None or mine.epoch != epoch:
            if mine is not None:
                self._remember(mine)
            mine = self._rows[row] = _Row(epoch, salt, Occurrences(_GRAM))
        text = mine.text
        text.extend(known[len(text.tokens) :].tolist())
        return self._best([text, *self._history.get(salt, ())], text.tokens, count)

    def _remember(self, row: _Row) -> None:
        """Keep the text of a sequence that has left its row."""
        if not self._memory:
            return
        texts = self._history.setdefault(row.salt, [])
        self._history.move_to_end(row.salt)
        if len(self._history) > _MOST_SALTS:
            self._history.popitem(last=False)
        if not texts or len(texts[-1].tokens) + len(row.text.tokens) > self._memory // 2:
            texts.append(Occurrences(_GRAM))
            del texts[:-2]
        texts[-1].extend(row.text.tokens[-self._memory // 2 :])

    def _best(self, texts: list[Occurrences], context: list[int], count: int) -> list[int]:
        """The path with the most tokens that are expected to be right."""
        found: list[tuple[int, list[int], int]] = [
            (text.agreement(end, context, self._longest), text.tokens, end)
            for text in texts
            for end in text.after(context)
        ]
        best: list[int] = []
        most = 0.0
        for length in sorted({entry[0] for entry in found}, reverse=True)[:_LENGTHS_TRIED]:
            places = [(tokens, end) for agreed, tokens, end in found if agreed >= length]
            limit = min(count, max(1, int(self._drafts_per_match * length)))
            path, expected = _follow(places, limit, lambda share: share >= self._least_share)
            if expected > most:
                best, most = path, expected
        return best


def _follow(
    places: list[tuple[list[int], int]], limit: int, goes_on: Callable[[float], bool]
) -> tuple[list[int], float]:
    """The commonest token after each, again and again; and how many of them should be right."""
    path: list[int] = []
    share, expected = 1.0, 0.0
    while len(path) < limit:
        step = len(path)
        next_tokens = [t[end + step] if end + step < len(t) else -1 for t, end in places]
        votes = Counter(token for token in next_tokens if token >= 0)
        if not votes:
            break
        token, number = votes.most_common(1)[0]
        share *= number / len(places)
        if not goes_on(share):
            break
        path.append(token)
        expected += share
        places = [place for place, each in zip(places, next_tokens, strict=True) if each == token]
    return path, expected
