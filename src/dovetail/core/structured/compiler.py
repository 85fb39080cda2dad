"""Compiles examined grammars inside the engine process, beside the steps."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from dovetail.core.structured.lru import ByteLru

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from dovetail.core.structured.backend import Backend

__all__ = ["GrammarCompiler"]

_CACHE_BYTES = 256 << 20
_COST_PER_GRAMMAR = 1 << 20
_COST_PER_BYTE = 64
"""What a compiled grammar takes, for lack of a figure: seen were 70 KiB for a small one and 50 MiB
for half a megabyte of text."""


class GrammarCompiler:
    """Grammars by text, compiled in a thread that runs without Python's lock most of the time.

    Args:
        make: Makes the backend, in that thread when the first grammar comes; may take long.
    """

    def __init__(self, make: Callable[[], Backend]) -> None:
        self._make = make
        self.backend: Backend | None = None
        """There once a grammar was compiled."""
        self._thread: ThreadPoolExecutor | None = None
        self._compiled: ByteLru[Future[LLMatcher]] = ByteLru(_CACHE_BYTES)
        self._news = threading.Event()

    def compile(self, grammar: str) -> Future[LLMatcher]:
        """A matcher at the grammar's start, to copy from. Raises what went wrong when asked for it.

        The future's exceptions: RequestFailedError, or what making the backend raised.
        """
        key = grammar.encode()
        known = self._compiled.get(key)
        if known is not None and not (known.done() and known.exception()):
            return known
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        future = self._thread.submit(self._compile, grammar)
        future.add_done_callback(lambda _: self._news.set())
        self._compiled.put(key, future, _COST_PER_GRAMMAR + _COST_PER_BYTE * len(key))
        return future

    def wait(self, seconds: float) -> None:
        """Return when a grammar was compiled since the last call, or after ``seconds``."""
        self._news.wait(seconds)
        self._news.clear()

    def close(self) -> None:
        """End the thread; what it is at, it finishes."""
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _compile(self, grammar: str) -> LLMatcher:
        if self.backend is None:
            self.backend = self._make()
        return self.backend.compile(grammar)
