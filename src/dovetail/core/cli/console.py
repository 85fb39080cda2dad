"""Writing to the terminal: results on stdout, everything about them on stderr."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import TextIO

__all__ = ["Progress", "emit", "note", "start_logging"]

_INTERVAL = 10.0
"""Seconds between two lines of progress where they cannot be overwritten."""


def emit(text: str = "", *, end: str = "\n") -> None:
    """Write a result to stdout, at once."""
    sys.stdout.write(text + end)
    sys.stdout.flush()


def note(text: str = "") -> None:
    """Write a line for people to stderr."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


class Progress:
    """One line that says how far something is.

    On a terminal the line is written over; elsewhere a new line comes when the text before the
    first figure changes, and otherwise every ten seconds.
    """

    def __init__(
        self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._stream = stream or sys.stderr
        self._clock = clock
        self._terminal = self._stream.isatty()
        self._shown = ""
        self._due = 0.0

    def show(self, text: str) -> None:
        """Show a state; an empty text or a repeated one changes nothing."""
        if not text or text == self._shown:
            return
        if self._terminal:
            self._stream.write(f"\r\x1b[K{text[:200]}")
        elif self._stage(text) == self._stage(self._shown) and self._clock() < self._due:
            return
        else:
            self._stream.write(text + "\n")
            self._due = self._clock() + _INTERVAL
        self._stream.flush()
        self._shown = text

    def clear(self) -> None:
        """Take the line away, where there is one."""
        if self._terminal and self._shown:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
        self._shown = ""

    @staticmethod
    def _stage(text: str) -> str:
        """The text up to its first digit: what is done, without how far it is."""
        return text.split(next((c for c in text if c.isdigit()), "\0"))[0]


class _LineFormatter(logging.Formatter):
    """``dovetail: warning: ...``; information has no prefix."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        if record.levelno <= logging.INFO:
            return text
        return f"dovetail: {record.levelname.lower()}: {text}"


def start_logging(level: str = "info") -> None:
    """Send the records of Dovetail's loggers to stderr, one line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_LineFormatter("%(message)s"))
    logger = logging.getLogger("dovetail")
    logger.handlers[:] = [handler]
    logger.setLevel(level.upper())
    logger.propagate = False
