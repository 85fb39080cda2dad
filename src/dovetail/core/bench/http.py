"""A small HTTP/1.1 client on asyncio streams: many connections, little work per chunk."""

from __future__ import annotations

import asyncio
import json
import ssl
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from dovetail.core.errors import ConfigError, DovetailError

__all__ = ["HttpClient", "HttpClientError", "Response"]

_LONGEST_LINE = 16 << 20


class HttpClientError(DovetailError):
    """The server could not be reached, broke off, or answered with an error status."""

    def __init__(self, message: str, *, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    used: bool = False


class Response:
    """An answer whose body is still to come. Ends its connection unless it is read to its end."""

    def __init__(self, client: HttpClient, connection: _Connection) -> None:
        self._client = client
        self._connection: _Connection | None = connection
        self._reader = connection.reader
        self.status = 0
        self.headers: dict[str, str] = {}

    async def begin(self) -> None:
        """Read the status line and the headers."""
        line = await self._reader.readline()
        parts = line.decode("latin-1").split(None, 2)
        if len(parts) < 2 or not parts[1].isdigit():
            raise ConnectionResetError("the server closed the connection without an answer")
        self.status = int(parts[1])
        while line := (await self._reader.readline()).strip():
            name, _, value = line.decode("latin-1").partition(":")
            self.headers[name.strip().lower()] = value.strip()

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body, in the pieces in which it comes. Raises HttpClientError if it breaks off."""
        try:
            async for chunk in self._chunks():
                yield chunk
        except (OSError, EOFError, ValueError) as error:
            raise HttpClientError(f"the server broke off: {type(error).__name__}") from error
        self._give_back()

    async def _chunks(self) -> AsyncIterator[bytes]:
        if self.headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await self._reader.readline()).split(b";")[0], 16):
                yield await self._reader.readexactly(size)
                await self._reader.readline()
            await self._reader.readline()
        elif "content-length" in self.headers:
            yield await self._reader.readexactly(int(self.headers["content-length"]))
        else:
            while data := await self._reader.read(1 << 16):
                yield data
            self.headers["connection"] = "close"

    async def read(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    async def events(self) -> AsyncIterator[bytes]:
        """The data of each server-sent event, as it comes; comments are left out."""
        rest = b""
        async for chunk in self.chunks():
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                if line.startswith(b"data:"):
                    yield line[5:].strip()

    def _give_back(self) -> None:
        if self._connection is None:
            return
        if self.headers.get("connection", "").lower() == "close":
            self._connection.writer.close()
        else:
            self._client.idle.append(self._connection)
        self._connection = None

    def close(self) -> None:
        """End the connection if the body was not read to its end; the server sees it at once."""
        if self._connection is not None:
            self._connection.writer.close()
            self._connection = None


class HttpClient:
    """Requests to one server over connections that are kept open. Belongs to one event loop.

    Args:
        base_url: Such as ``http://127.0.0.1:8000``; a path in it precedes all paths.
        headers: Sent with every request.
        verify: Check the server's certificate.
    """

    def __init__(
        self, base_url: str, *, headers: Mapping[str, str] | None = None, verify: bool = True
    ) -> None:
        url, port = _address(base_url)
        self.base_url = url.geturl().rstrip("/")
        self.idle: deque[_Connection] = deque()
        self._host = url.hostname
        self._port = port
        self._prefix = url.path.rstrip("/")
        self._tls = _tls(verify) if url.scheme == "https" else None
        lines = {"Host": url.netloc.rpartition("@")[2], "Accept": "*/*", **(headers or {})}
        self._headers = "".join(f"{name}: {value}\r\n" for name, value in lines.items())

    async def request(self, method: str, path: str, body: Any = None) -> Response:
        """Send a request, the body as JSON; returns when the headers of the answer are there.

        Raises:
            HttpClientError: The server cannot be reached, or broke off.
        """
        message = self._message(method, path, body)
        try:
            return await self._send(message)
        except (OSError, EOFError, ValueError) as error:
            reason = str(error) or type(error).__name__
            raise HttpClientError(f"{self.base_url} cannot be reached: {reason}") from error

    def _message(self, method: str, path: str, body: Any) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {self._prefix}{path} HTTP/1.1\r\n{self._headers}"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n"
        return head.encode("latin-1") + b"\r\n" + content

    async def _send(self, message: bytes) -> Response:
        connection = await self._connect()
        response = Response(self, connection)
        try:
            connection.writer.write(message)
            await connection.writer.drain()
            await response.begin()
        except (OSError, EOFError):
            response.close()
            if not connection.used:
                raise
            return await self._send(message)  # an idle connection that the server had closed
        except BaseException:
            response.close()
            raise
        connection.used = True
        return response

    async def _connect(self) -> _Connection:
        while self.idle:
            connection = self.idle.pop()
            if not connection.reader.at_eof():
                return connection
            connection.writer.close()
        reader, writer = await asyncio.open_connection(
            self._host, self._port, ssl=self._tls, limit=_LONGEST_LINE
        )
        return _Connection(reader, writer)

    async def json(self, method: str, path: str, body: Any = None) -> Any:
        """The answer, decoded.

        Raises:
            HttpClientError: As ``request``; or the status is not 200, with the server's message.
        """
        response = await self.request(method, path, body)
        content = await response.read()
        if response.status != 200:
            raise failure_of(response.status, content)
        return json.loads(content)

    async def close(self) -> None:
        """End the idle connections."""
        while self.idle:
            self.idle.pop().writer.close()


def failure_of(status: int, content: bytes) -> HttpClientError:
    """An error answer as an exception, with the message of the OpenAI envelope if it has one."""
    text = content.decode("utf-8", "replace").strip()
    try:
        error = json.loads(text)["error"]
        text = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        text = text[:300]
    return HttpClientError(f"status {status}: {text}", status=status)


def _address(base_url: str) -> tuple[SplitResult, int]:
    """The address in parts, and its port."""
    url = urlsplit(base_url if "://" in base_url else f"http://{base_url}")
    try:
        port = url.port or {"http": 80, "https": 443}[url.scheme]
    except (ValueError, KeyError):
        port = 0
    if not url.hostname or not port:
        raise ConfigError(f"{base_url!r} is no http:// or https:// address")
    return url, port


def _tls(verify: bool) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
