"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["StopChecker"]


class StopChecker:
    """Passes text on as far as no stop string can be in it any more.

    Of several stop strings the one that is complete first counts; of those that are complete at
    the same character, the longest. So the outcome does not depend on how the text is cut up.

    Args:
        stop: The strings to look for, none of them empty.
        include: Whether the text goes up to the end of the stop string, or only to its start.
    """

    __slots__ = ("_include", "_num_unsent", "_stop", "_tail", "_width", "matched")

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop = sorted(stop, key=len, reverse=True)
        self._include = include
        self._width = len(self._stop[0]) if self._stop else 1
        self._tail = ""
        self._num_unsent = 0
        self.matched: str | None = None
        """The stop string that was found; nothing is to be fed after that."""

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Take the next piece of text; return what can be shown.

        Args:
            text: What follows the piece before.
            armed: Whether a stop string that is complete within ``text`` counts.
        """
        seen = self._tail + text
        if armed:
            end, stop = self._find(seen, len(self._tail))
            if stop is not None:
                self.matched = stop
                first = len(self._tail) - self._num_unsent
                return seen[first : end if self._include else end - len(stop)]
        return self._advance(seen)

    def flush(self) -> str:
        """What was held back, if no stop string was found. Ends the text."""
        if self.matched is not None or not self._num_unsent:
            return ""
        unsent = self._tail[-self._num_unsent :]
        self._tail, self._num_unsent = "", 0
        return unsent

    def _find(self, seen: str, num_old: int) -> tuple[int, str | None]:
        """The first stop string to be complete after ``num_old`` characters, and where it ends."""
        best, found = len(seen) + 1, None
        for stop in self._stop:
            size = len(stop)
            start = seen.find(stop, max(0, num_old - size + 1), best)
            if start >= 0 and start + size < best:
                best, found = start + size, stop
        return best, found

    def _advance(self, seen: str) -> str:
        """Show all but the characters that may be the beginning of a stop string."""
        first = len(self._tail) - self._num_unsent
        self._tail = seen[max(0, len(seen) - self._width + 1) :]
        held = 0 if self._include else self._num_held()
        self._num_unsent = held
        return seen[first : len(seen) - held]

    def _num_held(self) -> int:
        """Length of the longest end of the text that begins a stop string."""
        tail = self._tail
        held = 0
        for stop in self._stop:
            start = tail.find(stop[0], max(0, len(tail) - len(stop) + 1))
            while 0 <= start < len(tail) - held:
                if stop.startswith(tail[start:]):
                    held = len(tail) - start
                    break
                start = tail.find(stop[0], start + 1)
        return held
