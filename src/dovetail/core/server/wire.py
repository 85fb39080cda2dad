"""HTTP/1.1 on the wire: uvicorn's httptools protocol with the bounds that it lacks.

httptools has no limit on headers, and uvicorn none on the time they take. Both are bounded here,
before anything of a request is kept; so are the body, and the time that data may lie unread.
A refusal is the same envelope as everywhere, and the connection is closed.
"""

from __future__ import annotations

import asyncio
import logging
from typing import ClassVar, NoReturn

import msgspec
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from dovetail.core.server.errors import Failure
from dovetail.core.server.settings import Limits

__all__ = ["WireProtocol", "wire_protocol"]

_log = logging.getLogger("dovetail.server.access")

LINGER_S = 2.0
"""How long a refused client that is still sending may go on, so that it gets to read why."""


def wire_protocol(limits: Limits) -> type[WireProtocol]:
    """The protocol class for uvicorn's ``http=``, with ``limits`` in force."""
    return type("WireProtocol", (WireProtocol,), {"limits": limits})


class _RefusedError(Exception):
    """Stops the parser inside a callback; uvicorn then calls ``send_400_response``."""


class WireProtocol(HttpToolsProtocol):
    """One connection."""

    limits: ClassVar[Limits] = Limits()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the books of a new connection."""
        super().connection_made(transport)
        self._in_headers = False
        self._announced_body = False
        self._header_bytes = 0
        self._body_bytes = 0
        self._silent_bytes = 0
        self._heard = False
        self._failure: Failure | None = None
        self._refused = False
        self._deadline: asyncio.TimerHandle | None = None
        self._stall: asyncio.TimerHandle | None = None
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Drop the timers."""
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse ``data``; bound what the parser keeps for itself until it has a whole item."""
        if self._refused:
            return
        self._heard = False
        super().data_received(data)
        self._silent_bytes = 0 if self._heard else self._silent_bytes + len(data)
        if self._silent_bytes > self.limits.header_bytes and not self._refused:
            self._refuse(self._headers_too_large())

    def on_message_begin(self) -> None:
        """A request begins: its headers must end in time."""
        super().on_message_begin()
        self._heard = self._in_headers = True
        self._announced_body = False
        self._header_bytes = self._body_bytes = 0
        if self._deadline is None:
            self._start_deadline()

    def on_url(self, url: bytes) -> None:
        """Count part of the request line."""
        super().on_url(url)
        self._count_header_bytes(len(url))

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count a header, or a trailer; look at what it says of the body."""
        self._count_header_bytes(len(name) + len(value) + 4)
        if len(self.headers) >= self.limits.header_count:
            self._stop(_too_many(f"The request has more than {self.limits.header_count} headers."))
        if name.lower() == b"content-length":
            self._announced_body = value.strip() != b"0"
            if not value.isdigit() or len(value) > 18 or int(value) > self.limits.body_bytes:
                self._stop(self._body_too_large())
        elif name.lower() == b"transfer-encoding":
            self._announced_body = True
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The request goes to the application, unless it cannot be served."""
        self._heard, self._in_headers = True, False
        self._stop_deadline()
        if self.parser.should_upgrade() and self._announced_body:
            message = "Upgrading the connection is not supported; leave out the Upgrade header."
            self._stop(Failure(status=400, message=message, code="upgrade_not_supported"))
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Count part of the body."""
        self._heard = True
        self._body_bytes += len(body)
        if self._body_bytes > self.limits.body_bytes:
            self._stop(self._body_too_large())
        super().on_body(body)

    def _count_header_bytes(self, num_bytes: int) -> None:
        self._heard = True
        self._header_bytes += num_bytes
        if self._header_bytes > self.limits.header_bytes:
            self._stop(self._headers_too_large())

    def pause_writing(self) -> None:
        """The client is behind: give it a while to read, then cut it off."""
        super().pause_writing()
        if self._stall is None:
            self._stall = self.loop.call_later(self.limits.write_stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has caught up."""
        super().resume_writing()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _start_deadline(self) -> None:
        seconds = self.limits.header_deadline_s
        self._deadline = self.loop.call_later(seconds, self._headers_late)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _stop_timers(self) -> None:
        self._stop_deadline()
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _headers_late(self) -> None:
        self._deadline = None
        if not self._in_headers:
            self.transport.close()
            return
        message = f"The headers did not come within {self.limits.header_deadline_s:g} seconds."
        self._refuse(Failure(status=408, message=message, code="request_timeout"))

    def _headers_too_large(self) -> Failure:
        return _too_many(f"The headers are longer than {self.limits.header_bytes} bytes.")

    def _body_too_large(self) -> Failure:
        message = f"The body must not be longer than {self.limits.body_bytes} bytes."
        return Failure(status=413, message=message, code="request_too_large")

    def _stop(self, failure: Failure) -> NoReturn:
        """Refuse from inside the parser."""
        self._failure = failure
        raise _RefusedError

    def send_400_response(self, msg: str) -> None:
        """Called by uvicorn when the parser stopped: at bad HTTP, or by ``_stop``."""
        message = "This is not a valid HTTP/1.1 request."
        self._refuse(self._failure or Failure(status=400, message=message, code="invalid_http"))

    def _refuse(self, failure: Failure) -> None:
        """Answer for the application, if the answer is still open, and close."""
        self._refused = True
        self._stop_deadline()
        _log.info("Connection from %s refused: %d %s", self.client, failure.status, failure.code)
        cycle = self.cycle
        if self._in_headers:
            answerable = cycle is None or cycle.response_complete
        else:
            answerable = cycle is None or not cycle.response_started
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        if not answerable:
            self.transport.close()
            return
        self.flow.resume_reading()
        self.transport.write(self._rendered(failure))
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self.loop.call_later(LINGER_S, self.transport.close)

    def _rendered(self, failure: Failure) -> bytes:
        body = msgspec.json.encode(failure.envelope())
        headers = [
            *self.server_state.default_headers,
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode("ascii")),
            (b"connection", b"close"),
        ]
        lines = [name + b": " + value + b"\r\n" for name, value in headers]
        return b"".join([STATUS_LINE[failure.status], *lines, b"\r\n", body])


def _too_many(message: str) -> Failure:
    return Failure(status=431, message=message, code="headers_too_large")
