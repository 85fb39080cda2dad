"""A scripted HTTP server for the tests of the load generator."""

import asyncio
import contextlib
import json
from contextlib import asynccontextmanager


class ScriptedServer:
    """Answers each request with what ``script(method, path, body)`` returns.

    That is ``(status, object)`` for JSON, or a list of things to send in order: bytes are one
    chunk of an event stream, numbers are seconds of waiting, and None cuts the connection.
    """

    def __init__(self, script):
        self.script = script
        self.requests = []
        self.num_connections = 0
        self.num_under_way = 0
        self.peak = 0
        self.num_cut = 0
        self.url = ""

    async def handle(self, reader, writer):
        self.num_connections += 1
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while line := await reader.readline():
                await self._answer(line, reader, writer)
        writer.close()

    async def _answer(self, line, reader, writer):
        method, path, _ = line.decode().split()
        headers = {}
        while header := (await reader.readline()).strip():
            name, _, value = header.decode().partition(":")
            headers[name.lower()] = value.strip()
        content = await reader.readexactly(int(headers.get("content-length", 0)))
        body = json.loads(content) if content else None
        self.requests.append((method, path, headers, body))
        self.num_under_way += 1
        self.peak = max(self.peak, self.num_under_way)
        try:
            await self._send(self.script(method, path, body), writer)
        except ConnectionError:
            self.num_cut += 1
            raise
        finally:
            self.num_under_way -= 1

    async def _send(self, answer, writer):
        if isinstance(answer, tuple):
            content = json.dumps(answer[1]).encode()
            head = f"HTTP/1.1 {answer[0]} X\r\ncontent-length: {len(content)}\r\n\r\n"
            writer.write(head.encode() + content)
            await writer.drain()
            return
        writer.write(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n")
        for part in answer:
            if part is None:
                writer.close()
                raise ConnectionResetError
            if isinstance(part, (int, float)):
                await writer.drain()
                await asyncio.sleep(part)
            else:
                writer.write(b"%x\r\n%s\r\n" % (len(part), part))
                await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()


@asynccontextmanager
async def scripted(script):
    server = ScriptedServer(script)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    server.url = f"http://127.0.0.1:{port}"
    try:
        yield server
    finally:
        listener.close()


def event(**chunk):
    return b"data: " + json.dumps(chunk).encode() + b"\n\n"


def text(piece):
    return event(choices=[{"index": 0, "text": piece, "finish_reason": None}])


def usage(prompt, completion):
    return event(choices=[], usage={"prompt_tokens": prompt, "completion_tokens": completion})


DONE = b"data: [DONE]\n\n"
