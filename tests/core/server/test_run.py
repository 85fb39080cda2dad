"""The life of a server: taking the address, loading, stopping, dying."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from dovetail.core.errors import ConfigError, OverloadedError
from dovetail.core.server.listen import bind
from dovetail.core.server.run import EXIT_CUT_OFF, EXIT_DRAINED, EXIT_ENGINE_DEAD, serve
from dovetail.core.server.settings import ServerError, ServerSettings
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import (
    COMPLETIONS,
    Running,
    checked_error,
    envelope,
    events,
    serving,
    until,
)


def stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def http(running: Running) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=running.url, timeout=10)


def stream(client: httpx.AsyncClient, num: int) -> asyncio.Task[httpx.Response]:
    body = {"prompt": "x", "stream": True, "max_tokens": num}
    return asyncio.create_task(client.post(COMPLETIONS, json=body))


async def exit_code(running: Running, seconds: float = 5.0) -> int:
    async with asyncio.timeout(seconds):
        return await running.task


async def test_a_taken_port_is_said_in_one_line() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ServerError) as found:
            bind("127.0.0.1", port)
        engine = FakeEngine()
        with pytest.raises(ServerError):
            await serve(engine, ServerSettings(), "127.0.0.1", port)
    message = str(found.value)
    assert f"Port {port}" in message and "--port" in message and "\n" not in message
    assert isinstance(found.value, ConfigError)


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [
        ("no.such.host.invalid", 0, "is not known"),
        ("203.0.113.1", 0, "no address 203.0.113.1"),
        ("127.0.0.1", 65536, "0 to 65535"),
        ("127.0.0.1", -1, "0 to 65535"),
    ],
)
def test_addresses_that_cannot_be_had(host: str, port: int, message: str) -> None:
    with pytest.raises(ServerError, match=message) as found:
        bind(host, port)
    assert "\n" not in str(found.value)


def test_names_mean_ipv4_first() -> None:
    with bind("localhost", 0) as sock:
        assert sock.family == socket.AF_INET
    with bind(None, 0) as sock:
        assert sock.getsockname()[0] == "0.0.0.0"


async def test_a_unix_socket_and_a_stale_one(tmp_path: Path) -> None:
    path = str(tmp_path / "server.sock")
    bind(None, 0, uds=path).close()
    assert Path(path).exists()
    listening = asyncio.Event()
    task = asyncio.create_task(
        serve(FakeEngine(), ServerSettings(), uds=path, on_listening=lambda _: listening.set())
    )
    await listening.wait()
    transport = httpx.AsyncHTTPTransport(uds=path)
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        assert (await client.get("/live")).status_code == 200
    with pytest.raises(ServerError, match="Unix socket"):
        bind(None, 0, uds=path)
    stop()
    assert await task == EXIT_DRAINED


async def test_a_listener_that_was_bound_before() -> None:
    listener = bind("127.0.0.1", 0)
    url: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(serve(FakeEngine(), listener=listener, on_listening=url.set_result))
    assert await url == f"http://127.0.0.1:{listener.getsockname()[1]}"
    stop()
    assert await task == EXIT_DRAINED


async def test_bad_certificates_are_a_plain_error(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nonsense")
    for name in ("x.pem", "missing.pem"):
        with pytest.raises(ServerError, match="certificate"):
            await serve(FakeEngine(), ServerSettings(), port=0, ssl_certfile=str(tmp_path / name))


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
async def test_https(tmp_path: Path) -> None:
    certificate, key = str(tmp_path / "cert.pem"), str(tmp_path / "key.pem")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-keyout", key, "-out", certificate, "-subj", "/CN=localhost"]
    subprocess.run([*command, "-days", "1"], check=True, capture_output=True)
    found: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    task = asyncio.create_task(
        serve(
            FakeEngine(),
            port=0,
            ssl_certfile=certificate,
            ssl_keyfile=key,
            on_listening=found.set_result,
        )
    )
    url = await found
    assert url.startswith("https://")
    async with httpx.AsyncClient(base_url=url, verify=False) as client:
        assert (await client.get("/live")).status_code == 200
        run = await stream(client, 5)
        assert len(events(run.text)) == 5
        large = await client.get("/live", headers={"x": "a" * 70_000})
        assert large.status_code == 431 and envelope(large)["code"] == "headers_too_large"
    stop()
    assert await task == EXIT_DRAINED


async def test_the_server_answers_while_the_engine_loads() -> None:
    engine = FakeEngine(state="loading", reason="weights, file 1 of 3")
    async with serving(engine) as running, http(running) as client:
        assert (await client.get("/live")).status_code == 200
        for response in (
            await client.get("/health"),
            await client.post(COMPLETIONS, json={"prompt": "x"}),
        ):
            assert response.status_code == 503
            assert "weights, file 1 of 3" in response.json()["error"]["message"]
        engine.set_state("ready")
        assert (await client.get("/health")).status_code == 200
        assert (await client.post(COMPLETIONS, json={"prompt": "x"})).status_code == 200
        stop()
        assert await exit_code(running) == EXIT_DRAINED
    assert engine.closed


async def test_stopping_while_loading_is_quick() -> None:
    engine = FakeEngine(state="loading")
    async with serving(engine, timeout=30) as running:
        began = time.monotonic()
        stop()
        assert await exit_code(running) == EXIT_DRAINED
        assert time.monotonic() - began < 2
    assert engine.drained_with is None and engine.closed


async def test_running_requests_finish_and_new_ones_are_refused() -> None:
    engine = FakeEngine(step_s=0.01)
    async with serving(engine) as running, http(running) as client:
        runs = [stream(client, 60) for _ in range(5)]
        await until(lambda: engine.running == 5)
        stop()
        await until(lambda: engine.status.state == "draining")
        for path in ("/ready", "/health"):
            response = await client.get(path)
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "draining"
        refused = await client.post(COMPLETIONS, json={"prompt": "x"})
        assert refused.status_code == 503
        assert envelope(refused)["code"] == "draining"
        assert refused.headers["connection"] == "close"
        assert refused.headers["retry-after"] == "1"
        assert (await client.get("/live")).status_code == 200
        for run in runs:
            chunks = events((await run).text)
            assert len(chunks) == 60 and chunks[-1]["choices"][0]["finish_reason"] == "length"
        assert await exit_code(running) == EXIT_DRAINED
    assert not engine.aborted and engine.closed


async def test_streams_beyond_the_deadline_end_with_an_error_event() -> None:
    engine = FakeEngine(step_s=0.02)
    async with serving(engine, timeout=0.4) as running, http(running) as client:
        run = stream(client, 4000)
        whole = asyncio.create_task(
            client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 4000})
        )
        await until(lambda: engine.running == 2)
        await asyncio.sleep(0.1)
        began = time.monotonic()
        stop()
        last = events((await run).text)[-1]
        assert checked_error(last)["code"] == "unavailable"
        assert 0.3 < time.monotonic() - began < 2
        response = await whole
        assert response.status_code == 503 and envelope(response)["code"] == "unavailable"
        assert await exit_code(running) == EXIT_CUT_OFF
    assert len(engine.aborted) == 2 and engine.closed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_second_signal_ends_at_once(number: int) -> None:
    engine = FakeEngine(step_s=0.02)
    async with serving(engine, timeout=60) as running, http(running) as client:
        run = stream(client, 4000)
        await until(lambda: engine.running == 1)
        await asyncio.sleep(0.1)
        stop()
        await until(lambda: engine.status.state == "draining")
        os.kill(os.getpid(), number)
        assert "error" in events((await run).text)[-1]
        assert await exit_code(running, 3) == EXIT_CUT_OFF
    assert engine.closed


async def test_an_idle_connection_does_not_hold_up_the_end() -> None:
    async with serving(FakeEngine(), timeout=30) as running, http(running) as client:
        await client.get("/live")
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        began = time.monotonic()
        stop()
        assert await exit_code(running) == EXIT_DRAINED
        assert time.monotonic() - began < 2
        writer.close()


async def test_a_dead_engine_ends_the_server(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine(step_s=0.01)
    async with serving(engine) as running, http(running) as client:
        run = stream(client, 4000)
        await until(lambda: engine.running == 1)
        await asyncio.sleep(0.1)
        engine.set_state("dead", "worker 3 was killed")
        with contextlib.suppress(httpx.TransportError):
            response = await client.post(COMPLETIONS, json={"prompt": "x"})
            assert response.status_code == 503
            assert envelope(response)["code"] == "engine_dead"
        assert checked_error(events((await run).text)[-1])["code"] == "engine_dead"
        assert await exit_code(running) == EXIT_ENGINE_DEAD
    assert "worker 3 was killed" in caplog.text


async def test_an_engine_that_dies_while_loading() -> None:
    engine = FakeEngine(state="loading")
    async with serving(engine) as running:
        engine.set_state("dead", "no memory")
        assert await exit_code(running) == EXIT_ENGINE_DEAD


async def test_a_drain_that_fails_still_ends(caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()

    async def broken(timeout: float) -> None:
        raise OverloadedError("lost the engine")

    engine.drain = broken  # type: ignore[method-assign]
    async with serving(engine) as running:
        stop()
        assert await exit_code(running) == EXIT_DRAINED
    assert "lost the engine" in caplog.text


async def test_signals_are_given_back(engine: Any = None) -> None:
    before = signal.getsignal(signal.SIGTERM)
    async with serving(FakeEngine()) as running:
        stop()
        await exit_code(running)
    assert signal.getsignal(signal.SIGTERM) == before
