"""A real server with many clients, some of which leave: nobody else notices, nothing is kept."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.checkpoints import make_checkpoint
from tests.servers import Server
from tests.thorough import thorough

NUM_STREAMS = 200
SETTLED = 5
NUM_PROMPTS = 25
STEP_TOKENS = 256


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("server")
    model = make_checkpoint("llama", folder / "model")
    flags = ["--served-model-name", "m", "--device", "cpu", "--dtype", "float32", "--threads", "1"]
    flags += ["--max-num-batched-tokens", str(STEP_TOKENS)]
    server = Server(folder / "log", str(model), *flags)
    yield server
    assert server.stop() == 0


async def read_stream(
    client: httpx.AsyncClient, prompt: str, leave_after: int | None
) -> str | None:
    """The text of a streamed completion; None if this client left before its end."""
    body = {
        "model": "m",
        "prompt": prompt,
        "max_tokens": 30,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    text, num_events = "", 0
    async with client.stream("POST", "/v1/completions", json=body) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            if line == "data: [DONE]":
                return text
            text += json.loads(line[6:])["choices"][0]["text"]
            num_events += 1
            if num_events == leave_after:
                return None
    raise AssertionError("the stream ended without [DONE]")


async def every_size(client: httpx.AsyncClient) -> None:
    """Steps of all sizes, for libraries keep a kernel for each: that memory is taken only once."""
    for size in [*range(1, 64), *range(64, STEP_TOKENS + 1, 8)]:
        body = {"model": "m", "prompt": [3 + size % 300] * size, "max_tokens": 1}
        assert (await client.post("/v1/completions", json=body)).status_code == 200


async def one_round(server: Server, expected: dict[str, str], number: int) -> None:
    """200 streams at once, every third of which leaves midway."""
    limits = httpx.Limits(max_connections=NUM_STREAMS)
    async with httpx.AsyncClient(base_url=server.url, limits=limits, timeout=120) as client:
        prompts = [list(expected)[(i + number) % len(expected)] for i in range(NUM_STREAMS)]
        leaving = [2 + i % 20 if i % 3 == 0 else None for i in range(NUM_STREAMS)]
        texts = await asyncio.gather(
            *(read_stream(client, p, n) for p, n in zip(prompts, leaving, strict=True))
        )
    for prompt, text, leave in zip(prompts, texts, leaving, strict=True):
        assert text == (None if leave is not None else expected[prompt])


@pytest.mark.parametrize("rounds", [2, pytest.param(10, marks=thorough)])
async def test_streams_survive_others_that_leave(server: Server, rounds: int) -> None:
    prompts = [f"the story number {i} " * (1 + i % 7) for i in range(NUM_PROMPTS)]
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:
        expected = {p: await read_stream(client, p, None) or "" for p in prompts}
        if rounds > SETTLED:
            await every_size(client)
    assert len(set(expected.values())) > NUM_PROMPTS // 2
    sizes = []
    for number in range(rounds):
        await one_round(server, expected, number)
        deadline = time.monotonic() + 10.0
        while server.gauge("dovetail:kv_cache_usage_perc") and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        assert server.gauge("dovetail:kv_cache_usage_perc") == 0.0
        assert server.gauge("dovetail:num_requests_running") == 0.0
        assert server.gauge("dovetail:num_requests_waiting") == 0.0
        sizes.append(server.resident_bytes())
    # Allocators settle for a while; what a round leaks, every later one leaks too.
    if rounds > SETTLED:
        growth = (sizes[-1] - sizes[SETTLED - 1]) / (rounds - SETTLED)
        assert growth < 1.2 * (1 << 20), f"{growth} bytes a round: {sizes}"


def test_a_signal_to_all_processes_lets_running_requests_end(server: Server) -> None:
    """As service managers and terminals give it. It is this server's last test."""
    body = {"model": "m", "prompt": "on and", "max_tokens": 200, "ignore_eos": True, "stream": True}
    reasons: list[str] = []
    with server.client.stream("POST", "/v1/completions", json=body) as response:
        for line in response.iter_lines():
            if not reasons:
                for process in server.pids():
                    os.kill(process, signal.SIGTERM)
            if line.startswith("data: {"):
                reasons.append(json.loads(line[6:])["choices"][0]["finish_reason"] or "")
    assert len(reasons) > 100 and reasons[-1] == "length"
    assert server.process.wait(30) == 0
    assert "error" not in server.log.read_text()
