"""A grammar that can be checked by hand, in place of those that are compiled.

Its text is a number of tokens, after which the answer is complete. A token may follow if it and the
tokens before it, added up, are no multiple of three.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dovetail.core.errors import InvariantError
from dovetail.core.request import Request
from dovetail.core.structured.base import Accepted
from dovetail.core.types import IntArray

__all__ = ["PlainGrammars", "allowed"]

_ASKED_BEFORE_READY = 3


def allowed(token_ids: Sequence[int], vocab_size: int) -> list[int]:
    """What may follow these tokens of an answer."""
    total = sum(token_ids)
    return [token for token in range(vocab_size) if (token + total) % 3]


class PlainGrammars:
    """Implements ``Grammars``, and holds the engine to what it says of them (I26).

    Args:
        vocab_size: V.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._asked: dict[int, int] = {}
        self._limits: dict[int, int] = {}
        self._tokens: dict[int, list[int]] = {}

    def prepare(self, request: Request) -> bool:
        """See ``Grammars``: ready when asked for the third time."""
        if request.id not in self._tokens:
            self._asked[request.id] = self._asked.get(request.id, 0) + 1
            if self._asked[request.id] < _ASKED_BEFORE_READY:
                return False
            self._limits[request.id] = int(request.grammar)
            self._tokens[request.id] = list(request.emitted)
        return True

    def wait(self, seconds: float) -> None:
        """See ``Grammars``: virtual time does not wait."""

    def masks(
        self,
        ids: Sequence[int],
        num_generated: Sequence[int],
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> IntArray:
        """See ``Grammars``."""
        guesses = drafts if drafts is not None else [()] * len(ids)
        rows = []
        for number, count, guess in zip(ids, num_generated, guesses, strict=True):
            tokens = self._tokens[number]
            if count != len(tokens):
                known = f"its grammar has {len(tokens)}"
                raise InvariantError("request", f"I26: {number} has {count} tokens, {known}")
            good = self.valid_drafts(number, guess)
            for k in range(len(guess) + 1):
                rows.append(self._bits([*tokens, *guess[:k]]) if k <= good else self._any())
        return np.array(rows, np.int32)

    def _bits(self, tokens: list[int]) -> IntArray:
        flags = np.zeros(-(-self._vocab_size // 32) * 32, np.uint8)
        flags[allowed(tokens, self._vocab_size)] = 1
        return np.packbits(flags, bitorder="little").view(np.int32)

    def _any(self) -> IntArray:
        return np.full(-(-self._vocab_size // 32), -1, np.int32)

    def valid_drafts(self, request_id: int, drafts: Sequence[int]) -> int:
        """See ``Grammars``."""
        tokens, limit = list(self._tokens[request_id]), self._limits[request_id]
        for index, draft in enumerate(drafts):
            if len(tokens) == limit or draft not in allowed(tokens, self._vocab_size):
                return index
            tokens.append(draft)
        return len(drafts)

    def accept(self, request_id: int, token_ids: Sequence[int]) -> Accepted:
        """See ``Grammars``."""
        tokens, limit = self._tokens[request_id], self._limits[request_id]
        for index, token in enumerate(token_ids):
            if token not in allowed(tokens, self._vocab_size):
                raise InvariantError("request", f"I26: {request_id} was given {token}")
            tokens.append(token)
            if len(tokens) == limit:
                return Accepted(index + 1, True)
        return Accepted(len(token_ids), False)

    def forget(self, request_id: int) -> None:
        """See ``Grammars``."""
        for kept in (self._asked, self._limits, self._tokens):
            kept.pop(request_id, None)
