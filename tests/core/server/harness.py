"""Ways to reach a server: without a socket, through one, and byte by byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx

from dovetail.core.server.app import create_app
from dovetail.core.server.run import serve
from dovetail.core.server.settings import ServerSettings
from tests.core.server.fakes import FakeEngine

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hello"}]


def client_of(engine: FakeEngine, **settings: Any) -> httpx.AsyncClient:
    """A client of an application without a socket in between."""
    app = create_app(engine, ServerSettings(**({"api_keys": ()} | settings)))
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server")


async def complete(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    """The answer to a completion request that must succeed."""
    return await _posted(engine, COMPLETIONS, {"prompt": "hi"} | body)


async def chat(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    """The answer to a chat request that must succeed."""
    return await _posted(engine, CHAT, {"messages": MESSAGES} | body)


async def _posted(engine: FakeEngine, path: str, body: dict[str, Any]) -> dict[str, Any]:
    async with client_of(engine) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result


async def refused(engine: FakeEngine, path: str, **body: Any) -> dict[str, Any]:
    """The error of a request that must be refused with 400."""
    base = {"prompt": "hi"} if path == COMPLETIONS else {"messages": MESSAGES}
    async with client_of(engine) as client:
        response = await client.post(path, json=base | body)
    assert response.status_code == 400, response.text
    return envelope(response)


def envelope(response: httpx.Response) -> dict[str, Any]:
    """The error of an answer, after its form was checked."""
    assert response.headers["content-type"] == "application/json"
    return checked_error(response.json())


def checked_error(body: Any) -> dict[str, Any]:
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


def events(text: str) -> list[Any]:
    """The events of a stream: JSON, and comments as text. Checks the framing and the end."""
    assert text.endswith("\n\n")
    found: list[Any] = []
    for block in text[:-2].split("\n\n"):
        assert "\n" not in block
        if block.startswith(": "):
            found.append(block)
        else:
            data = block.removeprefix("data: ")
            assert data != block
            found.append("[DONE]" if data == "[DONE]" else json.loads(data))
    assert found[-1] == "[DONE]" and found.count("[DONE]") == 1
    return found[:-1]


async def streamed(engine: FakeEngine, path: str, **body: Any) -> list[Any]:
    """The events of a stream that must begin well."""
    base = {"prompt": "hi"} if path == COMPLETIONS else {"messages": MESSAGES}
    async with client_of(engine) as client:
        response = await client.post(path, json=base | {"stream": True} | body)
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    return events(response.text)


class Running:
    """A server on a free port."""

    def __init__(self, url: str, task: asyncio.Task[int]) -> None:
        self.url = url
        self.port = int(url.rpartition(":")[2])
        self.task = task

    async def exchange(self, data: bytes, *, read_timeout: float = 5.0) -> bytes:
        """Send bytes, and read to the end of the connection or of patience."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            writer.write(data)
            return await read_all(reader, read_timeout)
        finally:
            writer.close()


async def read_all(reader: asyncio.StreamReader, timeout: float) -> bytes:
    got = b""
    with contextlib.suppress(TimeoutError, ConnectionResetError):
        async with asyncio.timeout(timeout):
            while chunk := await reader.read(65536):
                got += chunk
    return got


@contextlib.asynccontextmanager
async def serving(
    engine: FakeEngine, *, timeout: float = 5.0, **settings: Any
) -> AsyncIterator[Running]:
    """Run ``serve`` with the fake engine, in this event loop."""
    listening: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    settings = {"api_keys": ()} | settings
    task = asyncio.create_task(
        serve(
            engine,
            ServerSettings(**settings),
            port=0,
            shutdown_timeout=timeout,
            on_listening=listening.set_result,
        )
    )
    await asyncio.wait({task, listening}, return_when=asyncio.FIRST_COMPLETED)
    running = Running(listening.result() if listening.done() else str(task.result()), task)
    try:
        yield running
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def until(condition: Callable[[], bool], seconds: float = 3.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


def request_bytes(path: str, body: Any, *headers: str, close: bool = True) -> bytes:
    """A POST as it goes over the wire."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/1.1",
        "Host: server",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
        *(["Connection: close"] if close else []),
        *headers,
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data
