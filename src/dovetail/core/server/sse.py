"""Server-sent events: frames made cheaply, and the response that sends them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Protocol

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dovetail.core.engine.api import RequestDelta
from dovetail.core.server.admission import Admission, attended
from dovetail.core.server.errors import ClientGoneError, error_event, log_failure, to_failure

__all__ = ["DONE", "EventStream", "Renderer", "frame", "text_frame"]

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
SLOT = "\0text\0"
"""Stands for the text while a frame is prepared; no text of a model or name holds NUL."""

_encoder = msgspec.json.Encoder()


def frame(chunk: msgspec.Struct) -> bytes:
    """One event."""
    return b"data: " + _encoder.encode(chunk) + b"\n\n"


def text_frame(chunk: msgspec.Struct) -> tuple[bytes, bytes]:
    """What stands before and after the text in the event of ``chunk``, whose text is ``SLOT``."""
    before, _, after = frame(chunk).partition(_encoder.encode(SLOT))
    return before, after


class Renderer(Protocol):
    """Turns what the engine says into frames, for one request."""

    def start(self) -> bytes:
        """Frames that go before the first delta."""
        ...

    def delta(self, prompt_index: int, delta: RequestDelta) -> bytes:
        """Frames for what is new; empty if there is nothing to show yet."""
        ...

    def end(self) -> bytes:
        """Frames that go last."""
        ...


class EventStream(Response):
    """A streamed answer: attended, kept alive, and ended in good order whatever happens.

    The status is sent with the first delta, so that a refusal by the engine still is an HTTP
    error; or when the client has waited for ``keep_alive_s``, whichever comes first.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        deltas: AsyncIterator[tuple[int, RequestDelta]],
        renderer: Renderer,
        *,
        admission: Admission,
        keep_alive_s: float,
        request_id: str,
    ) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(None, headers=headers)
        del self.headers["content-length"]
        self._deltas = deltas
        self._renderer = renderer
        self._admission = admission
        self._keep_alive_s = keep_alive_s
        self._request_id = request_id

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; raises only if nothing was sent yet."""
        out = _Events(send, self.raw_headers, self._keep_alive_s)
        try:
            await attended(self._write(out), receive, self._admission, out.idle, self._keep_alive_s)
        except ClientGoneError:
            raise
        except Exception as exc:
            if not out.started:
                raise
            failure = to_failure(exc, self._request_id)
            log_failure(exc, failure, self._request_id)
            await out.send(error_event(failure) + DONE)
        await out.close()

    async def _write(self, out: _Events) -> None:
        renderer, head = self._renderer, self._renderer.start()
        async with contextlib.aclosing(self._deltas) as deltas:  # type: ignore[type-var]
            async for index, delta in deltas:
                frames = renderer.delta(index, delta)
                if head:
                    frames, head = head + frames, b""
                if frames:
                    await out.send(frames)
        await out.send(head + renderer.end() + DONE)


class _Events:
    """The sending side of one stream."""

    def __init__(self, send: Send, headers: list[tuple[bytes, bytes]], keep_alive_s: float) -> None:
        self._send = send
        self._headers = headers
        self._keep_alive_s = keep_alive_s
        self._clock = asyncio.get_running_loop().time
        self._last = self._clock()
        self.started = False

    async def send(self, frames: bytes) -> None:
        if not self.started:
            self.started = True
            await self._send(
                {"type": "http.response.start", "status": 200, "headers": self._headers}
            )
        self._last = self._clock()
        await self._send({"type": "http.response.body", "body": frames, "more_body": True})

    async def idle(self) -> float:
        """Send a comment if nothing was sent for long; returns when to look again."""
        left = self._keep_alive_s - (self._clock() - self._last)
        if left > 0:
            return left
        await self.send(KEEP_ALIVE)
        return self._keep_alive_s

    async def close(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})
