"""Where one sequence is in its grammar."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dovetail.core.structured.base import Accepted

if TYPE_CHECKING:
    from llguidance import LLMatcher

__all__ = ["Matcher"]


class Matcher:
    """Follows one sequence's tokens. After an error it allows everything, and reports the error.

    Args:
        start: A matcher at the grammar's start; copied.
        emitted: Tokens that were generated before.
    """

    __slots__ = ("error", "inner", "num_tokens")

    def __init__(self, start: LLMatcher | None, emitted: Sequence[int], error: str | None) -> None:
        self.inner = None if start is None else start.deep_copy()
        self.num_tokens = 0
        self.error = error
        if emitted:
            self.accept(emitted)

    def accept(self, token_ids: Sequence[int]) -> Accepted:
        """Go on behind these tokens; those behind the end of the answer are not taken."""
        inner = self.inner
        if self.error is not None or inner is None:
            return Accepted(0, False, self.error)
        for count, token in enumerate(token_ids, 1):
            if not inner.consume_token(token):
                self.fail(f"the token {token} does not fit the grammar")
                return Accepted(count - 1, False, self.error)
            self.num_tokens += 1
            if inner.is_stopped():
                if inner.is_error():
                    self.fail(_reason(inner))
                return Accepted(count, self.error is None, self.error)
        return Accepted(len(token_ids), False)

    def valid_drafts(self, drafts: Sequence[int]) -> int:
        """How many of these tokens may follow, one after another."""
        if self.error is not None or self.inner is None:
            return 0
        return self.inner.validate_tokens(list(drafts))

    def check(self, num_generated: int) -> None:
        """After a mask was worked out: whether that went well, and was the right one."""
        if self.inner is not None and self.inner.is_error():
            self.fail(_reason(self.inner))
        elif num_generated != self.num_tokens:
            self.fail(f"its grammar is at token {self.num_tokens} instead of {num_generated}")

    def fail(self, reason: str) -> None:
        """The request is lost; the first reason counts."""
        self.error = self.error or f"structured output failed: {reason}"


def _reason(inner: LLMatcher) -> str:
    """The first line of its error; those that follow are llguidance's own state."""
    return inner.get_error().strip().partition("\n")[0].partition("<state>")[0].strip()[:200]
