"""Finds out whether constraints can be followed, in processes that may die of it."""

from __future__ import annotations

import asyncio
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import msgspec

from dovetail.core.constraint import StructuredOutputsParams
from dovetail.core.errors import OverloadedError, PluginError, RequestError
from dovetail.core.structured.frames import Verdict, read_frame, write_frame
from dovetail.core.structured.limits import ANSWER_S, COMPILE_S, EXTRA_BYTES
from dovetail.core.structured.lru import ByteLru
from dovetail.core.structured.vocabulary import Vocabulary

__all__ = ["Examiner"]

_PROCESSES = 2
_QUEUE = 64
"""Constraints that may wait; one more is told to come again."""
_CACHE_BYTES = 16 << 20
_START_S = 60.0


class _EndedError(Exception):
    """The process is gone; says of what."""


class _Process:
    """One examining process, with its vocabulary read."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "dovetail.core.structured.child"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "RAYON_NUM_THREADS": "1"},
        )
        try:
            self._ask(vocabulary, _START_S)
        except _EndedError as error:
            raise PluginError(f"grammars cannot be examined: {error}") from None

    def examine(self, form: StructuredOutputsParams) -> Verdict:
        return self._ask(form, ANSWER_S)

    def _ask(self, message: msgspec.Struct, patience: float) -> Verdict:
        stdin, stdout = self._process.stdin, self._process.stdout
        if stdin is None or stdout is None:
            raise _EndedError("it has no pipes")
        try:
            write_frame(stdin, message)
        except BrokenPipeError:
            raise _EndedError(self.end()) from None
        with selectors.DefaultSelector() as selector:
            selector.register(stdout, selectors.EVENT_READ)
            if not selector.select(patience):
                self.end()
                raise _EndedError(f"it takes more than {patience:g} s to compile")
        data = read_frame(stdout)
        if data is None:
            raise _EndedError(self.end())
        return msgspec.msgpack.decode(data, type=Verdict)

    def end(self) -> str:
        """Kill it if it lives; what it died of."""
        self._process.kill()
        code = self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with_closed(pipe.close)
        if code == -signal.SIGPROF:
            return f"it takes more than {COMPILE_S:g} s to compile"
        return f"it needs more than {EXTRA_BYTES >> 20} MiB, or is nested too deeply, to compile"


def with_closed(close: Callable[[], None]) -> None:
    """Close a pipe whose other end may be gone with data still in it."""
    try:
        close()
    except BrokenPipeError:
        return


class Examiner:
    """Examines constraints; safe to use from any thread. Its processes start at first use.

    What was found is kept, good or bad, and who asks for the same at the same time waits for the
    same answer.

    Args:
        vocabulary: Called once, in a thread of the examiner's own.
    """

    def __init__(self, vocabulary: Callable[[], Vocabulary]) -> None:
        self._read_vocabulary = vocabulary
        self._vocabulary: Vocabulary | None = None
        self._lock = threading.Lock()
        self._threads = ThreadPoolExecutor(_PROCESSES, thread_name_prefix="examiner")
        self._idle: list[_Process] = []
        self._verdicts: ByteLru[Future[Verdict]] = ByteLru(_CACHE_BYTES)
        self._num_waiting = 0

    def grammar(self, form: StructuredOutputsParams) -> str:
        """The constraint in the engine's form. Waits.

        Raises:
            RequestError: It is wrong, matches nothing, or costs too much to compile; or the
                model's tokenizer does not serve for this.
            OverloadedError: Too many others wait.
        """
        return _unwrap(self._verdict(form).result(), form)

    async def grammar_async(self, form: StructuredOutputsParams) -> str:
        """As ``grammar``, without holding up the event loop."""
        future = self._verdict(form)
        if not future.done():
            await asyncio.shield(asyncio.wrap_future(future))
        return _unwrap(future.result(), form)

    def close(self) -> None:
        """End the processes."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        with self._lock:
            for process in self._idle:
                process.end()
            self._idle.clear()

    def _verdict(self, form: StructuredOutputsParams) -> Future[Verdict]:
        key = msgspec.msgpack.encode(form)
        with self._lock:
            known = self._verdicts.get(key)
            if known is not None:
                return known
            if self._num_waiting >= _QUEUE:
                raise OverloadedError("Too many schemas and grammars wait to be compiled.")
            self._num_waiting += 1
            future = self._threads.submit(self._examine, key, form)
            self._verdicts.put(key, future, 2 * len(key) + 1024)
        return future

    def _examine(self, key: bytes, form: StructuredOutputsParams) -> Verdict:
        try:
            return self._examined(form)
        except BaseException:
            with self._lock:
                self._verdicts.drop(key)
            raise
        finally:
            with self._lock:
                self._num_waiting -= 1

    def _examined(self, form: StructuredOutputsParams) -> Verdict:
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is None:
            process = _Process(self._known_vocabulary())
        try:
            verdict = process.examine(form)
        except _EndedError as error:
            return Verdict(reason=str(error))
        with self._lock:
            self._idle.append(process)
        return verdict

    def _known_vocabulary(self) -> Vocabulary:
        if self._vocabulary is None:
            self._vocabulary = self._read_vocabulary()
        return self._vocabulary


def _unwrap(verdict: Verdict, form: StructuredOutputsParams) -> str:
    if verdict.grammar:
        return verdict.grammar
    raise RequestError(
        f"structured_outputs.{form.kind} cannot be followed: {verdict.reason}.",
        param=f"structured_outputs.{form.kind}",
        code="invalid_grammar",
    )
