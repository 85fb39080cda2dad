"""How many requests may wait, and when one that is refused should come again."""

from __future__ import annotations

import math
from collections.abc import Callable

from dovetail.core.engine.api import EngineStats
from dovetail.core.errors import OverloadedError

__all__ = ["Gate"]

_MEMORY_S = 20.0
"""Time constant of the measured throughput."""
_LONGEST_S = 60


class Gate:
    """Refuses requests while the queue is full; one that finds nobody there may enter at any size.

    It counts what the front end itself has let in, so that no burst gets past it; the engine's
    reports only tell how much of that is running already. Belongs to one event loop.

    Args:
        max_requests: Sequences that may wait; None is no limit.
        max_tokens: Prompt tokens of requests without a first token yet; None is no limit.
        clock: Seconds; never goes back.
    """

    def __init__(
        self, max_requests: int | None, max_tokens: int | None, clock: Callable[[], float]
    ) -> None:
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.max_rows = 0
        """Sequences that the engine can run at a time; 0 until it is known."""
        self.num_tokens = 0
        """Prompt tokens of those that were let in and have no first token."""
        self._reported = EngineStats()
        self._clock = clock
        self._last = clock()
        self._drained = 0.0
        self._busy_s = 0.0

    def report(self, stats: EngineStats) -> None:
        """What the engine said last; an empty one for an engine that has just started."""
        self._reported = stats

    def refusal(self, open_sequences: int, num_sequences: int, num_tokens: int) -> str | None:
        """Why a request may not enter now; None if it may.

        Args:
            open_sequences: Those that were let in before and have not ended.
            num_sequences: Completions that the new request asks for.
            num_tokens: Tokens of its prompt.
        """
        beyond_rows = open_sequences - self._num_running()
        limit = self.max_requests
        if limit is not None and open_sequences and beyond_rows + num_sequences > limit:
            return f"{max(0, beyond_rows)} requests wait already, of {limit} at most"
        limit = self.max_tokens
        if limit is not None and self.num_tokens and self.num_tokens + num_tokens > limit:
            return f"{self.num_tokens} prompt tokens wait already, of {limit} at most"
        return None

    def _num_running(self) -> int:
        """Sequences that run, or could run at once: while nobody waits, every row is taken soon."""
        return self._reported.num_running if self._reported.num_waiting else self.max_rows

    def check(self, open_sequences: int, num_sequences: int, num_tokens: int) -> None:
        """Raise OverloadedError if a request may not enter now; arguments as in ``refusal``."""
        reason = self.refusal(open_sequences, num_sequences, num_tokens)
        if reason is not None:
            seconds = self.retry_after()
            raise OverloadedError(
                f"The queue is full: {reason}. Try again in {seconds} s.", retry_after=seconds
            )

    def enter(self, num_tokens: int) -> None:
        """A request was let in."""
        self._pass_time()
        self.num_tokens += num_tokens

    def start(self, num_tokens: int) -> None:
        """A request that was let in has its first token."""
        self.leave(num_tokens)
        self._drained += num_tokens

    def leave(self, num_tokens: int) -> None:
        """A request that was let in ended without a first token."""
        self._pass_time()
        self.num_tokens -= num_tokens

    def retry_after(self) -> int:
        """Seconds, 1 to 60, in which the queue as it is now gets its first tokens.

        Prompt tokens that wait, by prompt tokens that got an answer per second while any waited.
        """
        self._pass_time()
        if not self._drained:
            return min(_LONGEST_S, max(1, math.ceil(self._busy_s)))
        seconds = math.ceil(self.num_tokens * self._busy_s / self._drained)
        return min(_LONGEST_S, max(1, seconds))

    def _pass_time(self) -> None:
        """Only time in which somebody waits says how fast the queue moves."""
        now = self._clock()
        if self.num_tokens:
            keep = math.exp((self._last - now) / _MEMORY_S)
            self._drained *= keep
            self._busy_s = self._busy_s * keep + _MEMORY_S * (1 - keep)
        self._last = now
