"""What a client can do with bare bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dovetail.core.server.settings import Limits
from dovetail.core.server.wire import WireProtocol
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import (
    COMPLETIONS,
    Running,
    checked_error,
    read_all,
    request_bytes,
    serving,
    until,
)

HEAD = b"GET /live HTTP/1.1\r\nHost: x\r\n"
MIB = 1 << 20


@contextlib.asynccontextmanager
async def wire(**limits: Any) -> AsyncIterator[Running]:
    async with serving(FakeEngine(), limits=Limits(**limits)) as running:
        yield running
        assert b"200 OK" in await running.exchange(HEAD + b"Connection: close\r\n\r\n")


def parsed(answer: bytes) -> tuple[int, dict[str, str], Any]:
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    return int(status.split()[1]), headers, json.loads(body)


def check_refusal(answer: bytes, status: int, code: str) -> str:
    got, headers, body = parsed(answer)
    assert got == status, answer
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    error = checked_error(body)
    assert error["code"] == code
    return str(error["message"])


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def pour(running: Running, first: bytes, piece: bytes, total: int) -> tuple[bytes, int, int]:
    """Send ``first`` and then pieces until refused. Returns the answer, bytes sent, RSS growth."""
    reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
    before, sent = rss(), 0
    writer.write(first)
    with contextlib.suppress(ConnectionError):
        while sent < total:
            writer.write(piece)
            sent += len(piece)
            await writer.drain()
            if reader._buffer or reader.at_eof():  # type: ignore[attr-defined]
                break
    answer = await read_all(reader, 5)
    growth = rss() - before
    writer.close()
    return answer, sent, growth


async def test_a_giant_header_is_refused_early() -> None:
    async with wire() as running:
        answer, sent, growth = await pour(running, HEAD + b"X: ", b"a" * 65536, 16 * MIB)
        check_refusal(answer, 431, "headers_too_large")
        assert sent < 4 * MIB and growth < 8 * MIB


async def test_a_giant_header_in_one_piece_is_still_answered() -> None:
    async with wire() as running:
        answer = await running.exchange(HEAD + b"X: " + b"a" * (16 * MIB) + b"\r\n\r\n")
        check_refusal(answer, 431, "headers_too_large")


@pytest.mark.parametrize("size", [1000, 60_000])
async def test_headers_up_to_the_limit_pass(size: int) -> None:
    async with wire() as running:
        answer = await running.exchange(
            HEAD + b"X: %b\r\nConnection: close\r\n\r\n" % (b"a" * size)
        )
        assert parsed(answer)[0] == 200


async def test_a_giant_request_line_is_refused() -> None:
    async with wire() as running:
        answer, sent, growth = await pour(running, b"GET /", b"a" * 65536, 16 * MIB)
        check_refusal(answer, 431, "headers_too_large")
        assert sent < 4 * MIB and growth < 8 * MIB


@pytest.mark.parametrize(("num", "status"), [(126, 200), (129, 431), (2000, 431)])
async def test_the_number_of_headers_is_bounded(num: int, status: int) -> None:
    async with wire() as running:
        headers = b"".join(b"X-%d: 1\r\n" % i for i in range(num))
        answer = await running.exchange(HEAD + headers + b"Connection: close\r\n\r\n")
        assert parsed(answer)[0] == status


@pytest.mark.parametrize("filler", [b"\r\n", b"X: y\r\n"])
async def test_endless_small_pieces_are_refused(filler: bytes) -> None:
    async with wire() as running:
        first = b"" if filler == b"\r\n" else HEAD
        answer, _, growth = await pour(running, first, filler * 8192, 16 * MIB)
        check_refusal(answer, 431, "headers_too_large")
        assert growth < 8 * MIB


@pytest.mark.parametrize("begun", [HEAD, HEAD + b"X: a", b"GET /"])
async def test_slow_headers_are_cut_off(begun: bytes) -> None:
    async with wire(header_deadline_s=0.3) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        began = time.monotonic()
        writer.write(begun)
        drip = asyncio.create_task(_drip(writer))
        answer = await read_all(reader, 3)
        drip.cancel()
        assert 0.2 < time.monotonic() - began < 2.5
        check_refusal(answer, 408, "request_timeout")
        writer.close()


async def _drip(writer: asyncio.StreamWriter) -> None:
    while True:
        await asyncio.sleep(0.1)
        writer.write(b"x")


async def test_the_deadline_holds_for_each_request_of_a_connection() -> None:
    async with wire(header_deadline_s=0.3) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        for _ in range(3):
            writer.write(HEAD + b"\r\n")
            assert b"200 OK" in await reader.read(65536)
            await asyncio.sleep(0.15)
        writer.write(HEAD)
        check_refusal(await read_all(reader, 2), 408, "request_timeout")
        writer.close()


async def test_a_connection_without_a_word_is_closed_in_silence() -> None:
    async with wire(header_deadline_s=0.2) as running:
        assert await running.exchange(b"", read_timeout=2) == b""


async def test_an_announced_giant_body_is_refused_unread() -> None:
    async with wire() as running:
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Length: {1 << 30}\r\n\r\n"
        answer, sent, growth = await pour(running, head.encode(), b"a" * 65536, 1 << 30)
        check_refusal(answer, 413, "request_too_large")
        assert sent < 8 * MIB and growth < 8 * MIB


async def test_absurd_lengths_are_refused() -> None:
    async with wire() as running:
        for length in ("9" * 19, "9" * 40, str(1 << 63), str(32 * MIB + 1)):
            head = f"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n"
            got = parsed(await running.exchange(head.encode()))
            assert got[0] in (400, 413) and checked_error(got[2])


async def test_an_endless_chunked_body_is_refused_in_bounded_memory() -> None:
    async with wire(body_bytes=4 * MIB) as running:
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n"
        )
        chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
        answer, sent, growth = await pour(running, head.encode(), chunk, 1 << 30)
        check_refusal(answer, 413, "request_too_large")
        assert sent < 16 * MIB and growth < 24 * MIB


@pytest.mark.parametrize("tail", [b"0\r\nX: ", b"1;x="])
async def test_endless_trailers_and_extensions_are_refused(tail: bytes) -> None:
    async with wire() as running:
        head = (
            f"POST {COMPLETIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Transfer-Encoding: chunked\r\n\r\n"
        )
        answer, sent, growth = await pour(running, head.encode() + tail, b"a" * 65536, 64 * MIB)
        check_refusal(answer, 431, "headers_too_large")
        assert sent < 4 * MIB and growth < 8 * MIB


async def test_a_body_at_the_limit_passes() -> None:
    async with wire(body_bytes=1000) as running:
        for size, status in ((1000, 200), (1001, 413)):
            body = b'{"prompt":"x"' + b" " * (size - 14) + b"}"
            assert len(body) == size
            answer = await running.exchange(request_bytes(COMPLETIONS, body))
            assert parsed(answer)[0] == status


async def test_a_body_that_stops_coming_is_cut_off() -> None:
    async with wire(body_stall_s=0.2) as running:
        data = request_bytes(COMPLETIONS, {"prompt": "x"})
        check_refusal(await running.exchange(data[:-3], read_timeout=2), 408, "request_timeout")


BAD_HTTP = [
    b"hello\r\n\r\n",
    b"GET / HTTP/9.9\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost x\r\n\r\n",
    b"GET / HTTP/1.1\r\nHost: x\r\n folded: y\r\n\r\n",
    b"GET / HTTP/1.1\r\nX\x00: y\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET http://[/ HTTP/1.1\r\nHost: x\r\n\r\n",
    b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    b"POST / HTTP/1.1\r\nContent-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    b"POST / HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
    b"POST /tokenize HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
]


async def test_bad_http_gets_the_envelope() -> None:
    async with wire() as running:
        for data in BAD_HTTP:
            answer = await running.exchange(data)
            assert answer.startswith(b"HTTP/1.1 4"), (data, answer)
            assert checked_error(parsed(answer)[2])


async def test_an_upgrade_with_a_body_is_refused_rather_than_left_hanging() -> None:
    async with wire() as running:
        headers = ("Upgrade: h2c", "Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AA")
        data = request_bytes(COMPLETIONS, {"prompt": "x"}, *headers, close=False)
        assert "Upgrade" in check_refusal(
            await running.exchange(data), 400, "upgrade_not_supported"
        )


@pytest.mark.parametrize("kind", [b"websocket", b"h2c"])
async def test_an_upgrade_without_a_body_is_ignored(kind: bytes) -> None:
    async with wire() as running:
        data = HEAD + b"Upgrade: %b\r\nConnection: Upgrade\r\n\r\n" % kind
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(data)
        assert b"200 OK" in await reader.read(65536)
        writer.close()


async def test_requests_in_a_pipeline_are_answered_in_order() -> None:
    async with wire() as running:
        one = request_bytes(COMPLETIONS, {"prompt": "x", "max_tokens": 1}, close=False)
        two = HEAD + b"Connection: close\r\n\r\n"
        answer = await running.exchange(one + one + two)
        assert answer.count(b"HTTP/1.1 200 OK") == 3
        assert answer.count(b'"text":"a"') == 2
        assert answer.endswith(b'{"status":"live"}')


async def test_garbage_during_an_answer_does_not_mix_with_it() -> None:
    engine = FakeEngine(step_s=0.01)
    async with serving(engine) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        body = {"prompt": "x", "stream": True, "max_tokens": 10_000 // 4}
        writer.write(request_bytes(COMPLETIONS, body, close=False))
        await until(lambda: engine.running == 1)
        await asyncio.sleep(0.1)
        writer.write(b"garbage\r\n\r\n")
        answer = await read_all(reader, 3)
        assert answer.count(b"HTTP/1.1") == 1
        await until(lambda: engine.running == 0)
        writer.close()


async def test_the_remains_of_a_refused_body_do_not_matter() -> None:
    async with serving(FakeEngine(), api_keys=("k",)) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        body = b'{"prompt": "' + b"x" * 500_000 + b'"}'
        writer.write(request_bytes(COMPLETIONS, body, close=False))
        assert b"401 Unauthorized" in await reader.read(65536)
        writer.write(HEAD + b"\r\n")
        assert b"200 OK" in await reader.read(65536)
        writer.close()


async def test_a_reader_that_stops_is_cut_off() -> None:
    engine = FakeEngine(text="x" * 10)
    engine.info = type(engine.info)(
        **{f: getattr(engine.info, f) for f in engine.info.__struct_fields__}
        | {"max_model_len": 1 << 20}
    )
    async with serving(engine, limits=Limits(write_stall_s=0.4)) as running:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", running.port))
            body = {"prompt": "x", "stream": True, "max_tokens": 1_000_000}
            sock.sendall(request_bytes(COMPLETIONS, body))
            await until(lambda: engine.running == 1)
            began = time.monotonic()
            await until(lambda: engine.running == 0, 20)
            assert time.monotonic() - began > 0.3
            assert len(engine.aborted) == 1


async def test_a_slow_but_steady_reader_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    resumed: list[int] = []
    resume = WireProtocol.resume_writing
    monkeypatch.setattr(
        WireProtocol, "resume_writing", lambda self: (resumed.append(1), resume(self))
    )
    async with serving(FakeEngine(), limits=Limits(write_stall_s=2)) as running:
        sock = socket.socket()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", running.port))
        sock.setblocking(False)
        loop, num_bytes, end = asyncio.get_running_loop(), 0, b""
        body = {"prompt": "x", "stream": True, "max_tokens": 2500, "n": 20}
        await loop.sock_sendall(sock, request_bytes(COMPLETIONS, body))
        while chunk := await loop.sock_recv(sock, 65536):
            num_bytes, end = num_bytes + len(chunk), (end + chunk)[-100:]
            if num_bytes < 20_000:
                await asyncio.sleep(0.1)
        sock.close()
    assert b"data: [DONE]" in end and num_bytes > 10_000_000
    assert resumed
