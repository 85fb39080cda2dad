"""Deadlines and the queue's limits over a real engine process; the null platform sets the pace."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dovetail import AsyncEngine, EngineConfig, PromptTokens, SamplingParams
from dovetail.core.errors import OverloadedError, RequestTimeoutError
from dovetail.core.request import Request
from tests.checkpoints import make_checkpoint

PROMPT = PromptTokens(text=None, token_ids=[5, 6, 7, 8, 9])
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
SHORT = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
SLACK = 1.5
"""On a busy machine. Nothing here that has a deadline would end by itself so soon."""

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@contextlib.asynccontextmanager
async def started(model: Path, **settings: Any) -> AsyncIterator[AsyncEngine]:
    """Two rows, ten milliseconds a step."""
    fields = {"max_num_seqs": 2, "options": {"step_us": 10_000}} | settings
    config = EngineConfig.from_kwargs(model=str(model), device="null", **fields)
    engine = await AsyncEngine.start(config)
    await engine.wait_ready()
    try:
        yield engine
    finally:
        await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: Path) -> AsyncIterator[AsyncEngine]:
    async with started(model) as engine:
        yield engine


async def run(engine: AsyncEngine, params: SamplingParams, **labels: Any) -> int:
    """Tokens that came before the end, whatever the end was; its time is checked."""
    count, timeout = 0, labels.get("timeout")
    began = time.monotonic()
    try:
        async for delta in engine.stream(PROMPT, params, **labels):
            count += sum(len(c.token_ids) for c in delta.completions)
    except RequestTimeoutError as error:
        assert timeout is not None
        assert f"within {timeout:g} s" in str(error)
        assert timeout - 0.01 <= time.monotonic() - began <= timeout + SLACK
    return count


async def idle(engine: AsyncEngine, seconds: float = 10.0) -> None:
    """All blocks must be back soon."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        stats = engine.stats
        if not stats.num_running and not stats.num_waiting and stats.num_blocks:
            break
        await asyncio.sleep(0.01)
    assert engine.stats.num_free_blocks == engine.stats.num_blocks
    assert engine._outputs.num_open == 0
    assert engine._gate.num_tokens == 0


async def test_a_running_request_ends_at_its_deadline(engine: AsyncEngine) -> None:
    count = await run(engine, LONG, timeout=0.5)
    assert 5 <= count <= 60
    await idle(engine)


async def test_a_waiting_request_ends_at_its_deadline(engine: AsyncEngine) -> None:
    bystanders = [asyncio.create_task(run(engine, LONG)) for _ in range(2)]
    await asyncio.sleep(0.1)
    waiting = [asyncio.create_task(run(engine, LONG, timeout=0.3 + i / 10)) for i in range(5)]
    assert await asyncio.gather(*waiting) == [0] * 5
    assert await asyncio.gather(*bystanders) == [400, 400]
    await idle(engine)


async def test_a_deadline_that_is_met_changes_nothing(engine: AsyncEngine) -> None:
    assert await run(engine, SHORT, timeout=30.0) == 5
    await idle(engine)


async def test_all_completions_of_a_prompt_end_together(engine: AsyncEngine) -> None:
    params = SamplingParams(n=4, temperature=1.0, max_tokens=400, ignore_eos=True)
    assert await run(engine, params, timeout=0.3) > 0
    await idle(engine)


async def test_a_jump_of_the_wall_clock_changes_nothing(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = asyncio.create_task(run(engine, LONG, timeout=0.5))
    await asyncio.sleep(0.1)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert await task > 0
    await idle(engine)


async def test_a_deadline_holds_while_the_process_restarts(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with started(model) as engine:
        # The next process takes its time before it says anything.
        monkeypatch.setenv("DOVETAIL_FAULTS", "engine.outbox:delay=1@1")
        task = asyncio.create_task(run(engine, LONG, timeout=0.4))
        await asyncio.sleep(0.1)
        assert engine.engine_pid is not None
        os.kill(engine.engine_pid, signal.SIGKILL)
        await asyncio.sleep(0.2)
        assert engine.status.state == "restarting"
        assert await task > 0
        assert engine.status.state == "restarting"
        await engine.wait_ready()
        await asyncio.sleep(0.1)
        assert engine.stats.num_generation_tokens == 0, "it was taken up again after its end"
        await idle(engine)


async def test_a_flood_is_served_as_far_as_there_is_room(model: Path) -> None:
    async with started(model, max_num_queued_requests=10) as engine:
        ended: list[str] = []
        refused_s: list[float] = []

        async def client() -> None:
            began = time.perf_counter()
            try:
                ended.append("done" if await run(engine, SHORT) == 5 else "short")
            except OverloadedError as error:
                refused_s.append(time.perf_counter() - began)
                assert error.status == 429
                assert 1 <= error.retry_after <= 60

        # Two rows of five steps of 10 ms serve 40 requests a second; 400 come in each of two.
        tasks = []
        began = time.monotonic()
        for _ in range(800):
            tasks.append(asyncio.create_task(client()))
            await asyncio.sleep(0.0025)
        sent_s = time.monotonic() - began
        await asyncio.gather(*tasks)
        assert len(ended) + len(refused_s) == 800, "a request was lost"
        assert set(ended) == {"done"}
        assert statistics.median(refused_s) < 0.02
        possible = 40 * sent_s
        assert len(ended) >= 0.7 * possible
        assert len(ended) <= possible + 12 + 5
        await idle(engine)


async def test_a_burst_cannot_get_past_the_limit(model: Path) -> None:
    async with started(model, max_num_queued_requests=10) as engine:
        results = await asyncio.gather(
            *(run(engine, SHORT) for _ in range(100)), return_exceptions=True
        )
        assert sum(result == 5 for result in results) == 12
        assert sum(isinstance(result, OverloadedError) for result in results) == 88
        await idle(engine)


async def test_completions_count_each(model: Path) -> None:
    async with started(model, max_num_queued_requests=4) as engine:
        params = SamplingParams(n=3, temperature=1.0, max_tokens=5, ignore_eos=True)
        results = await asyncio.gather(
            *(run(engine, params) for _ in range(4)), return_exceptions=True
        )
        assert sum(result == 15 for result in results) == 2
        await idle(engine)


async def test_prompt_tokens_that_wait_are_limited(model: Path) -> None:
    async with started(model, max_num_queued_tokens=25) as engine:
        results = await asyncio.gather(
            *(run(engine, SHORT) for _ in range(20)), return_exceptions=True
        )
        assert sum(result == 5 for result in results) == 5
        await idle(engine)


async def test_a_deadline_holds_while_a_grammar_is_examined(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def admit(*arguments: object) -> list[Request]:
        await asyncio.sleep(30)
        return []

    monkeypatch.setattr(engine._intake, "admit", admit)
    assert await run(engine, SHORT, timeout=0.3) == 0
    await idle(engine)
