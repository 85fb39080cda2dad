"""How often an engine process may be replaced."""

from __future__ import annotations

__all__ = ["Restarts"]

_ALLOWED = 3
"""Processes that may end on their own within ``_WINDOW_S`` before they are given up."""
_WINDOW_S = 60.0


class Restarts:
    """Counts the ends of processes."""

    def __init__(self) -> None:
        self.count = 0
        """Processes that were replaced."""
        self._ends: list[float] = []

    def allow(self, now: float) -> bool:
        """Whether a process that has ended, at ``now`` in seconds, is to be replaced."""
        self._ends = [end for end in self._ends if now - end < _WINDOW_S] + [now]
        if len(self._ends) > _ALLOWED:
            return False
        self.count += 1
        return True
