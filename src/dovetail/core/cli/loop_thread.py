"""An event loop beside a program that waits for the keyboard."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Generic, TypeVar

__all__ = ["LoopThread"]

T = TypeVar("T")

_SIGNAL_CHECK_S = 0.1


class LoopThread:
    """Runs coroutines in a thread of its own, so that they live on while the caller blocks.

    Use as a context manager; what still runs at its end is cancelled.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    def __enter__(self) -> LoopThread:
        self._thread.start()
        return self

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine. Ctrl-C cancels it, and is raised again once it has ended."""
        work = _Work(coroutine)
        try:
            self._loop.call_soon_threadsafe(work.start)
            work.wait()
        except KeyboardInterrupt:
            self._loop.call_soon_threadsafe(work.cancel)
            work.wait()
            raise
        return work.result()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        asyncio.run_coroutine_threadsafe(_cancel_all(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Work(Generic[T]):
    """A coroutine that one thread waits for and the loop of another runs.

    ``start`` and ``cancel`` are called in the loop, in this order if both are: a Ctrl-C may come
    before the waiting thread knows whether it has asked for the start.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, T]) -> None:
        self._coroutine = coroutine
        self._task: asyncio.Task[T] | None = None
        self._ended = threading.Event()

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._coroutine)
        self._task.add_done_callback(lambda _: self._ended.set())

    def cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()
        else:
            self._coroutine.close()
            self._ended.set()

    def wait(self) -> None:
        """Block until the coroutine has ended.

        Python runs a signal's handler in the main thread only, and cannot wake it when the system
        gave the signal to another thread, or just before the wait began. So it wakes by itself.
        """
        while not self._ended.wait(_SIGNAL_CHECK_S):
            continue

    def result(self) -> T:
        if self._task is None:
            raise RuntimeError("the coroutine was never started")
        return self._task.result()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
