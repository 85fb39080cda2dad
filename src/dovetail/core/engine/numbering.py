"""Numbers on messages, so that one that is lost or comes twice is noticed."""

from __future__ import annotations

from dovetail.core.errors import InvariantError

__all__ = ["Numbered", "Numbers", "unnumbered"]

_SIZE = 8


class Numbers:
    """The sender's side: 1, 2, 3, ... in front of each message."""

    def __init__(self) -> None:
        self._last = 0

    def wrap(self, data: bytes) -> bytes:
        """The next message as it is sent."""
        self._last += 1
        return self._last.to_bytes(_SIZE, "little") + data


class Numbered:
    """The receiver's side."""

    def __init__(self) -> None:
        self._last = 0

    def unwrap(self, frame: bytes) -> bytes | None:
        """The message in a frame; None if it was there before.

        Raises:
            InvariantError: A message before it was lost, so that nothing can be relied on.
        """
        number = int.from_bytes(frame[:_SIZE], "little")
        if number == 0:
            return frame[_SIZE:]
        if number > self._last + 1:
            raise InvariantError("engine", f"I14: message {number} follows message {self._last}")
        is_new = number == self._last + 1
        self._last = max(self._last, number)
        return frame[_SIZE:] if is_new else None


def unnumbered(data: bytes) -> bytes:
    """A message as it is sent beside the numbered ones, such as a heartbeat."""
    return bytes(_SIZE) + data
