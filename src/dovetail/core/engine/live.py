"""The requests that the front end has let in and that have not ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from typing import Any

from dovetail.core.engine.api import RequestDelta
from dovetail.core.engine.gate import Gate
from dovetail.core.engine.listeners import Listeners
from dovetail.core.engine.outputs import OutputProcessor
from dovetail.core.errors import (
    DovetailError,
    RequestFailedError,
    RequestTimeoutError,
)
from dovetail.core.faults import fault
from dovetail.core.plugins.registry import describe_error
from dovetail.core.request import FinishReason, PromptTokens, Request, SamplingParams

__all__ = ["LiveRequest", "LiveRequests", "late"]

_log = logging.getLogger(__name__)

_CRASHES_PER_REQUEST = 2
"""A request that was running at this many crashes is not tried again."""


def late(timeout: float | None) -> RequestTimeoutError:
    """What a request is told that had ``timeout`` seconds."""
    seconds = timeout or 0.0
    shown = round(seconds, 1 if seconds >= 1 else 2)
    return RequestTimeoutError(f"The request was not finished within {shown:g} s.")


@dataclass(eq=False, kw_only=True)
class LiveRequest:
    """A request on its way: what is needed to take it up again on another process."""

    name: str
    requests: dict[int, Request]
    """Its sequences by id."""
    num_prompt_tokens: int
    queue: asyncio.Queue[RequestDelta | Exception] = field(default_factory=asyncio.Queue)
    has_started: bool = False
    """It has its first token."""
    num_crashes: int = 0
    timer: asyncio.TimerHandle | None = None
    """Goes off at its deadline."""


class LiveRequests:
    """All of them, and the books that are kept over them. Belongs to one event loop."""

    def __init__(self, outputs: OutputProcessor, gate: Gate, listeners: Listeners) -> None:
        self._outputs = outputs
        self._gate = gate
        self._listeners = listeners
        self._by_name: dict[str, LiveRequest] = {}
        self._enders: set[asyncio.Task[None]] = set()
        """Tasks that end requests whose deadline has passed."""

    def __len__(self) -> int:
        return len(self._by_name)

    def __iter__(self) -> Iterator[LiveRequest]:
        """All at the time of the call."""
        return iter(list(self._by_name.values()))

    def __contains__(self, live: LiveRequest) -> bool:
        return live.name in self._by_name

    def add(
        self, label: str, prompt: PromptTokens, params: SamplingParams, requests: list[Request]
    ) -> LiveRequest:
        """Let a request in.

        Args:
            label: The client's name for it.
            prompt: Its prompt.
            params: As the client gave them.
            requests: Its sequences, made of these.
        """
        # The engine's own number keeps apart two requests whose clients chose the same id.
        live = LiveRequest(
            name=f"{label}#{requests[0].id}",
            requests={request.id: request for request in requests},
            num_prompt_tokens=len(prompt.token_ids),
        )
        stops = requests[0].stop_token_ids
        self._outputs.add(live.name, prompt, params, list(live.requests), stops)
        self._by_name[live.name] = live
        self._gate.enter(live.num_prompt_tokens)
        self._listeners.started(live.name, requests)
        return live

    def set_deadline(
        self, live: LiveRequest, seconds: float, end: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        """Run ``end`` in ``seconds``, on the monotonic clock, unless the request ends before."""

        def begin() -> None:
            task = asyncio.create_task(end())
            self._enders.add(task)
            task.add_done_callback(self._enders.discard)

        live.timer = asyncio.get_running_loop().call_later(max(0.0, seconds), begin)

    def deliver(self, name: str, item: RequestDelta | DovetailError) -> list[int]:
        """Hand over what the engine produced; of a request that has ended, drop it.

        Returns:
            The sequences of the request that still run, if it could not be handed over: the
            request has failed.
        """
        live = self._by_name.get(name)
        if live is None:
            return []
        try:
            fault("frontend.deliver", next(iter(live.requests)))
            self._deliver(live, item)
        except Exception as error:
            _log.exception("what is new of request %s could not be handed over", name)
            text = f"its output could not be handed over: {describe_error(error)}"
            return self.end(live, RequestFailedError(text))
        return []

    def _deliver(self, live: LiveRequest, item: RequestDelta | DovetailError) -> None:
        if isinstance(item, Exception):
            self._listeners.ended(live.name, "error")
        else:
            self._listeners.delivered(live.name, item)
        if isinstance(item, RequestDelta) and not live.has_started:
            live.has_started = True
            self._gate.start(live.num_prompt_tokens)
        if isinstance(item, Exception) or item.finished:
            self._forget(live)
        live.queue.put_nowait(item)

    def end(self, live: LiveRequest, error: DovetailError | None = None) -> list[int]:
        """End a request early; its reader gets ``error``. Returns the sequences that still run."""
        if live not in self:
            return []
        self._forget(live)
        self._listeners.ended(live.name, _reason(error))
        if error is not None:
            live.queue.put_nowait(error)
        return self._outputs.abort(live.name)

    def blame_running(self) -> None:
        """The process ended: requests that were there too often are not tried again."""
        for live in self:
            live.num_crashes += 1
            if live.num_crashes >= _CRASHES_PER_REQUEST:
                self.end(live, RequestFailedError("the engine process ended while it ran"))

    def _forget(self, live: LiveRequest) -> None:
        del self._by_name[live.name]
        if live.timer is not None:
            live.timer.cancel()
        if not live.has_started:
            self._gate.leave(live.num_prompt_tokens)


def _reason(error: DovetailError | None) -> FinishReason:
    """How a request ended that ended early."""
    if error is None:
        return "abort"
    return "timeout" if isinstance(error, RequestTimeoutError) else "error"
