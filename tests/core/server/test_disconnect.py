"""When the client goes, its request ends."""

from __future__ import annotations

import asyncio
import logging

import httpx
import pytest

from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    request_bytes,
    serving,
    until,
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine(step_s=0.01)


BODIES = [
    (COMPLETIONS, {"prompt": "x"}, 1),
    (COMPLETIONS, {"prompt": ["x", "y", "z"], "n": 2}, 3),
    (CHAT, {"messages": MESSAGES, "n": 2}, 1),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "body", "num_jobs"), BODIES)
@pytest.mark.parametrize("ending", ["close", "abort"])
async def test_a_disconnect_aborts_at_once(
    engine: FakeEngine, path: str, body: dict[str, object], num_jobs: int, stream: bool, ending: str
) -> None:
    async with serving(engine) as running:
        reader, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(request_bytes(path, body | {"stream": stream, "max_tokens": 3000}))
        await until(lambda: engine.running == num_jobs)
        if stream:
            await reader.read(100)
        await asyncio.sleep(0.03)
        writer.close() if ending == "close" else writer.transport.abort()
        await until(lambda: engine.running == 0, 1.0)
        assert len(engine.aborted) == num_jobs


@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_before_the_first_token(stream: bool) -> None:
    engine = FakeEngine()
    engine.silent_first_s = 30
    async with serving(engine) as running:
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(request_bytes(CHAT, {"messages": MESSAGES, "stream": stream}))
        await until(lambda: engine.running == 1)
        writer.close()
        await until(lambda: engine.running == 0, 1.0)


async def test_a_disconnect_in_the_middle_of_the_body(engine: FakeEngine) -> None:
    async with serving(engine) as running:
        _, writer = await asyncio.open_connection("127.0.0.1", running.port)
        writer.write(request_bytes(CHAT, {"messages": MESSAGES})[:-5])
        await asyncio.sleep(0.05)
        writer.close()
        async with httpx.AsyncClient(base_url=running.url) as client:
            await asyncio.sleep(0.05)
            assert 'status="4xx"' in (await client.get("/metrics")).text
    assert not engine.calls


async def test_others_go_on(engine: FakeEngine) -> None:
    async with serving(engine) as running, httpx.AsyncClient(base_url=running.url) as client:
        body = {"prompt": "x", "max_tokens": 50}
        stays = asyncio.create_task(client.post(COMPLETIONS, json=body))
        for _ in range(5):
            _, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(request_bytes(COMPLETIONS, body | {"stream": True}))
            await until(lambda: engine.running == 2)
            writer.transport.abort()
            await until(lambda: engine.running == 1)
        assert (await stays).json()["choices"][0]["text"] == "abcdefghij" * 5


async def test_it_is_logged_and_counted(
    engine: FakeEngine, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        async with serving(engine) as running:
            _, writer = await asyncio.open_connection("127.0.0.1", running.port)
            writer.write(request_bytes(CHAT, {"messages": MESSAGES}))
            await until(lambda: engine.running == 1)
            writer.close()
            await until(lambda: engine.running == 0)
            async with httpx.AsyncClient(base_url=running.url) as client:
                metrics = (await client.get("/metrics")).text
    assert f"POST '{CHAT}' 499" in caplog.text
    assert "Exception in ASGI application" not in caplog.text
    assert 'vllm:request_success_total{engine="0",finished_reason="abort",' in metrics
    line = next(
        x
        for x in metrics.splitlines()
        if x.startswith("vllm:request_success_total") and "abort" in x
    )
    assert line.endswith(" 1.0")
