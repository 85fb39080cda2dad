"""The engine process and its front end: streams, aborts, deaths, restarts."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from dovetail import AsyncEngine, EngineConfig, PromptTokens, SamplingParams
from dovetail.core.errors import (
    CheckpointError,
    ContextLengthError,
    EngineDeadError,
    OverloadedError,
    RequestError,
    RequestFailedError,
)
from tests.checkpoints import make_checkpoint

PROMPT = PromptTokens(text=None, token_ids=[5, 6, 7, 8, 9])
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: Path) -> AsyncIterator[AsyncEngine]:
    """One engine for the tests that leave it whole; it may have been restarted."""
    engine = await AsyncEngine.start(EngineConfig(model=str(model), device="cpu", threads=1))
    await engine.wait_ready()
    yield engine
    await engine.close()
    assert engine.engine_pid is None


async def start_null(model: Path) -> AsyncEngine:
    """An engine that is soon there, for tests that ruin it."""
    engine = await AsyncEngine.start(EngineConfig(model=str(model), device="null"))
    await engine.wait_ready()
    return engine


async def tokens(engine: AsyncEngine, prompt: PromptTokens, params: SamplingParams) -> list[int]:
    return [
        token
        async for delta in engine.stream(prompt, params)
        for completion in delta.completions
        for token in completion.token_ids
    ]


async def idle(engine: AsyncEngine) -> None:
    """Wait until the engine says that nothing is left."""
    for _ in range(200):
        stats = engine.stats
        if not stats.num_running and not stats.num_waiting and stats.num_blocks:
            break
        await asyncio.sleep(0.02)
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


async def test_streams_run_side_by_side_and_agree(engine: AsyncEngine) -> None:
    many = await asyncio.gather(*(tokens(engine, PROMPT, LONG) for _ in range(8)))
    assert all(len(t) == 400 for t in many)
    assert all(t == many[0] for t in many)
    await idle(engine)


async def test_generate_gives_all_so_far(engine: AsyncEngine) -> None:
    params = SamplingParams(n=3, temperature=1.0, seed=3, max_tokens=20, ignore_eos=True)
    outputs = [o async for o in engine.generate(PROMPT, params, request_id="mine")]
    last = outputs[-1]
    assert last.finished
    assert [c.index for c in last.outputs] == [0, 1, 2]
    assert all(len(c.token_ids) == 20 and c.finish_reason == "length" for c in last.outputs)
    assert len({tuple(c.token_ids) for c in last.outputs}) == 3
    again = [o async for o in engine.generate(PROMPT, params)][-1]
    assert [c.token_ids for c in again.outputs] == [c.token_ids for c in last.outputs]


async def test_closing_a_stream_aborts_the_request(engine: AsyncEngine) -> None:
    stream = engine.stream(PROMPT, LONG)
    async for _ in stream:
        break
    await stream.aclose()
    await idle(engine)


async def test_a_cancelled_task_aborts_the_request(engine: AsyncEngine) -> None:
    task = asyncio.create_task(tokens(engine, PROMPT, LONG))
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await idle(engine)


async def test_wrong_requests_never_reach_the_engine(engine: AsyncEngine) -> None:
    before = engine.stats.num_steps
    with pytest.raises(RequestError, match="empty"):
        await tokens(engine, PromptTokens(text="", token_ids=[]), LONG)
    with pytest.raises(RequestError, match="token id 384; this model's token ids go from 0 to 383"):
        await tokens(engine, PromptTokens(text=None, token_ids=[1, 384]), LONG)
    with pytest.raises(ContextLengthError, match="maximum context length is 512 tokens"):
        await tokens(engine, PromptTokens(text=None, token_ids=[1] * 512), LONG)
    with pytest.raises(ContextLengthError, match="400 for the answer"):
        await tokens(engine, PromptTokens(text=None, token_ids=[1] * 200), LONG)
    assert engine.stats.num_steps == before


async def test_streams_go_on_after_the_process_was_killed(engine: AsyncEngine) -> None:
    want = await tokens(engine, PROMPT, LONG)
    seeded = SamplingParams(temperature=1.0, seed=1, max_tokens=400, ignore_eos=True)
    want_seeded = await tokens(engine, PROMPT, seeded)
    first = engine.engine_pid
    running = [asyncio.create_task(tokens(engine, PROMPT, p)) for p in (LONG, seeded, LONG)]
    await asyncio.sleep(0.1)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    got = await asyncio.gather(*running)
    assert engine.engine_pid != first
    assert got == [want, want_seeded, want]
    assert engine.stats.num_restarts > 0
    await idle(engine)


async def test_a_request_that_keeps_killing_the_process_is_given_up(engine: AsyncEngine) -> None:
    guilty = asyncio.create_task(tokens(engine, PROMPT, LONG))
    for _ in range(2):
        await engine.wait_ready()
        await asyncio.sleep(0.05)
        pid = engine.engine_pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        while engine.engine_pid == pid:
            await asyncio.sleep(0.01)
    with pytest.raises(RequestFailedError, match="ended while it ran"):
        await guilty
    await engine.wait_ready()
    assert len(await tokens(engine, PROMPT, LONG)) == 400


async def test_a_process_that_ends_again_and_again_is_given_up(model: Path) -> None:
    engine = await start_null(model)
    while engine.status.state != "dead":
        pid = engine.engine_pid
        if pid is not None and engine.status.state == "ready":
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.05)
    assert "ended with status -9" in engine.status.reason
    with pytest.raises(EngineDeadError):
        await tokens(engine, PROMPT, LONG)
    await engine.close()


async def test_a_draining_engine_finishes_what_runs(model: Path) -> None:
    engine = await start_null(model)
    running = asyncio.create_task(tokens(engine, PROMPT, LONG))
    await asyncio.sleep(0.05)
    draining = asyncio.create_task(engine.drain(30.0))
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError, match="draining"):
        await tokens(engine, PROMPT, LONG)
    await draining
    assert running.done() or len(await running) == 400
    assert len(running.result()) == 400
    await engine.close()


async def test_a_model_that_cannot_be_loaded_says_why(model: Path, tmp_path: Path) -> None:
    for file in model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"nonsense")
    engine = await AsyncEngine.start(EngineConfig(model=str(tmp_path), device="cpu"))
    with pytest.raises(EngineDeadError, match=r"model\.safetensors"):
        await engine.wait_ready()
    await engine.close()


async def test_a_missing_model_is_said_at_once() -> None:
    with pytest.raises(CheckpointError, match="no/such/model"):
        await AsyncEngine.start(EngineConfig(model="/no/such/model", device="cpu"))


async def test_the_engine_ends_with_its_parent(model: Path) -> None:
    code = (
        "import asyncio, os\n"
        "from dovetail import AsyncEngine, EngineConfig\n"
        "async def main():\n"
        f"    e = await AsyncEngine.start(EngineConfig(model={str(model)!r}, device='null'))\n"
        "    await e.wait_ready()\n"
        "    print(e.engine_pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    pid = int(out)
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        await asyncio.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists()
