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

    __slots__ = ("_first_chars", "_include", "_stop", "_tail", "matched")

    def __init__(self, stop: Sequence[str], include: bool = False) -> None:
        self._stop = sorted(stop, key=len, reverse=True)
        self._first_chars = {string[0] for string in stop}
        self._include = include
        self._tail = ""
        """The longest end of the text that is the beginning of a stop string."""
        self.matched: str | None = None
        """The stop string that was found; nothing is to be fed after that."""

    def feed(self, text: str, *, armed: bool = True) -> str:
        """Take the next piece of text; return what can be shown.

        Args:
            text: What follows the piece before.
            armed: Whether a stop string that is complete within ``text`` counts.
        """
        if not self._tail:
            for char in self._first_chars:
                if char in text:
                    break
            else:
                return text
        num_old = len(self._tail)
        num_shown = num_old if self._include else 0
        seen = self._tail + text
        if armed:
            end, stop = self._find(seen, num_old)
            if stop is not None:
                self.matched = stop
                return seen[num_shown : end if self._include else end - len(stop)]
        start = self._find_beginning(seen)
        self._tail = seen[start:]
        return seen[num_shown:] if self._include else seen[:start]

    def flush(self) -> str:
        """What was held back, if no stop string was found. Ends the text."""
        held = "" if self._include or self.matched is not None else self._tail
        self._tail = ""
        return held

    def _find(self, seen: str, num_old: int) -> tuple[int, str | None]:
        """The first stop string to be complete after ``num_old`` characters, and where it ends."""
        best, found = len(seen) + 1, None
        for stop in self._stop:
            size = len(stop)
            start = seen.find(stop, max(0, num_old - size + 1), best)
            if start >= 0 and start + size < best:
                best, found = start + size, stop
        return best, found

    def _find_beginning(self, seen: str) -> int:
        """Where the longest end of ``seen`` begins that is the beginning of a stop string."""
        first = len(seen)
        for stop in self._stop:
            start = seen.find(stop[0], max(0, len(seen) - len(stop) + 1), first)
            while start >= 0:
                if stop.startswith(seen[start:]):
                    first = start
                    break
                start = seen.find(stop[0], start + 1, first)
        return first
