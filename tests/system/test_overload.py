"""A real server, ten times overloaded, over a platform that takes its time: nothing is lost."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.checkpoints import make_checkpoint
from tests.servers import Server

PER_SECOND = 8
"""What is served: four rows, fifty steps a request, ten milliseconds a step."""
FLAGS = [
    "--device", "null", "--max-num-seqs", "4", "--max-num-queued-requests", "8",
    "--options", '{"step_us": 10000, "token": 70}', "--served-model-name", "m",
]  # fmt: skip
BODY = {"model": "m", "prompt": [5, 6, 7], "max_tokens": 50, "ignore_eos": True}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    server = Server(folder / "log", str(make_checkpoint("llama", folder / "model")), *FLAGS)
    yield server
    assert server.stop() == 0


async def idle(server: Server) -> None:
    """All blocks come back soon."""
    end = time.monotonic() + 10.0
    while server.gauge("dovetail:kv_cache_usage_perc") and time.monotonic() < end:
        await asyncio.sleep(0.05)
    for name in ("kv_cache_usage_perc", "num_requests_running", "num_requests_waiting"):
        assert server.gauge(f"dovetail:{name}") == 0.0


async def test_ten_times_too_many(server: Server) -> None:
    seconds = 4.0
    refused_s: list[float] = []
    codes: list[int] = []
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:

        async def one() -> None:
            began = time.perf_counter()
            response = await client.post("/v1/completions", json=BODY)
            codes.append(response.status_code)
            if response.status_code == 429:
                refused_s.append(time.perf_counter() - began)
                assert response.json()["error"]["code"] == "overloaded"
                assert 1 <= int(response.headers["retry-after"]) <= 60
            else:
                assert response.status_code == 200, response.text
                assert response.json()["usage"]["completion_tokens"] == 50

        began = time.monotonic()
        async with asyncio.TaskGroup() as tasks:
            for number in range(int(10 * PER_SECOND * seconds)):
                await asyncio.sleep(began + number / (10 * PER_SECOND) - time.monotonic())
                tasks.create_task(one())
    served = codes.count(200)
    assert served + codes.count(429) == 10 * PER_SECOND * seconds, "a request was lost"
    # Rows and queue are full at the end of the flood, and are served after it.
    assert served >= 0.7 * PER_SECOND * seconds + 8
    assert served <= PER_SECOND * (time.monotonic() - began) + 4
    assert statistics.median(refused_s) < 0.1
    await idle(server)


async def test_deadlines(server: Server) -> None:
    long = BODY | {"max_tokens": 400}
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as client:
        began = time.monotonic()
        response = await client.post(
            "/v1/completions", json=long, headers={"X-Request-Timeout": "0.5"}
        )
        assert 0.5 <= time.monotonic() - began < 2.5
        assert response.status_code == 504
        assert response.json()["error"]["code"] == "timeout"
        text = (
            await client.post("/v1/completions", json=long | {"timeout": 0.5, "stream": True})
        ).text
    *tokens, error, done = text.removesuffix("\n\n").split("\n\n")
    assert 5 < len(tokens) < 60
    assert json.loads(error.removeprefix("data: "))["error"]["code"] == "timeout"
    assert done == "data: [DONE]"
    await idle(server)
