"""Who may enter, who is inside, and how everyone is sent home."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.types import Receive

from dovetail.core.engine.api import EngineClient, EngineStatus
from dovetail.core.server.errors import ClientGoneError, HttpError

__all__ = ["Admission", "attended", "unavailable"]

T = TypeVar("T")
_DRAINING = "The server is shutting down and takes no new requests; try another one."


def unavailable(status: EngineStatus, *, draining: bool = False) -> HttpError | None:
    """Why the server is not ready; None if it is."""
    reason = f": {status.reason}" if status.reason else ""
    if status.state == "dead":
        message = "The engine ended and could not be brought back; the server is stopping."
        return _refusal(message, "engine_dead", retry_after=10, close=True)
    if draining or status.state == "draining":
        return _refusal(_DRAINING, "draining", retry_after=1, close=True)
    if status.state == "loading":
        return _refusal(f"The model is still loading{reason}.", "loading", retry_after=2)
    if status.state == "restarting":
        return _refusal(f"The engine is restarting{reason}.", "restarting", retry_after=2)
    return None


def _refusal(message: str, code: str, *, retry_after: int, close: bool = False) -> HttpError:
    headers = {"retry-after": str(retry_after)} | ({"connection": "close"} if close else {})
    return HttpError(503, message, code=code, headers=headers)


class Admission:
    """The requests that are being answered, and whether more may come."""

    def __init__(self) -> None:
        self.draining = False
        """Set once the server is asked to stop; never cleared."""
        self._running: dict[asyncio.Task[Any], Exception | None] = {}

    def __len__(self) -> int:
        return len(self._running)

    def check(self, client: EngineClient) -> None:
        """Let a new request in, or raise why not. The engine itself queues while it restarts.

        A full queue refuses here, before the request is read, so that a flood costs little.
        """
        refusal = unavailable(client.status, draining=self.draining)
        if refusal is not None and refusal.code != "restarting":
            raise refusal
        client.check_open()

    def enter(self, task: asyncio.Task[Any]) -> None:
        """Count ``task`` as running until it is done."""
        self._running[task] = None
        task.add_done_callback(self._leave)

    def _leave(self, task: asyncio.Task[Any]) -> None:
        if self._running.get(task) is None:
            self._running.pop(task, None)

    def reason(self, task: asyncio.Task[Any]) -> Exception | None:
        """Why ``abort_all`` ended ``task``; None if it did not."""
        return self._running.pop(task, None)

    def abort_all(self, error: Exception) -> int:
        """End everything that runs; its clients are told ``error``. Returns how many there were."""
        running = [task for task in self._running if not task.done()]
        for task in running:
            self._running[task] = error
            task.cancel()
        return len(running)


async def attended(
    work: Coroutine[Any, Any, T],
    receive: Receive,
    admission: Admission,
    idle: Callable[[], Awaitable[float]] | None = None,
    idle_after: float | None = None,
) -> T:
    """Run ``work`` for a client that is watched: it ends when the client goes.

    Args:
        work: Cancelled, and waited for, when the client closes the connection.
        receive: The connection, its request body already read.
        admission: Told of the work, so that a shutdown can end it.
        idle: Called when time has passed without end; returns seconds until the next call.
        idle_after: Seconds until the first call of ``idle``.

    Raises:
        ClientGoneError: The client closed the connection.
        Exception: What ``work`` raised, or what ``abort_all`` was given.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_gone(receive))
    admission.enter(task)
    wait = idle_after
    try:
        while True:
            done, _ = await asyncio.wait(
                (task, gone), timeout=wait, return_when=asyncio.FIRST_COMPLETED
            )
            if task in done:
                return _outcome(task, admission)
            if gone in done:
                raise ClientGoneError
            if idle is not None:
                wait = await idle()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)
        admission.reason(task)


def _outcome(task: asyncio.Task[T], admission: Admission) -> T:
    if task.cancelled():
        reason = admission.reason(task)
        if reason is not None:
            raise reason
    return task.result()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        continue
