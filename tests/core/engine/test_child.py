"""An engine process that ends when it should not: nobody waits for it, and nobody is harmed."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from pathlib import Path

import pytest

from dovetail import AsyncEngine, EngineConfig, PromptTokens, RequestOutput, SamplingParams
from dovetail.core.engine.child import EngineChild
from dovetail.core.engine.messages import Abort
from tests.checkpoints import make_checkpoint

pytestmark = pytest.mark.asyncio


async def test_one_that_never_connects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    child = await asyncio.wait_for(EngineChild.start(EngineConfig(), "reference", {}), 10)
    assert await asyncio.wait_for(child.wait(), 10) == 1
    child.send(Abort(ids=[1]))
    await child.end(0)
    child.send(Abort(ids=[2]))


@pytest.mark.parametrize("ready", [False, True])
async def test_closing_waits_only_for_one_that_listens(
    ready: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waited: list[float] = []
    end = EngineChild.end

    async def noted(child: EngineChild, patience: float) -> None:
        waited.append(patience)
        await end(child, patience)

    monkeypatch.setattr(EngineChild, "end", noted)
    engine = await AsyncEngine.start(EngineConfig(device="reference"))
    if ready:
        await engine.wait_ready()
    await engine.close()
    assert [patience > 0 for patience in waited] == [ready]


async def test_what_a_terminal_signals_does_not_reach_it() -> None:
    child = await EngineChild.start(EngineConfig(), "reference", {})
    try:
        assert os.getsid(child.pid) == child.pid != os.getsid(0)
    finally:
        await child.end(0)


async def test_a_request_that_comes_while_it_dies_is_taken_up_by_the_next(tmp_path: Path) -> None:
    model = make_checkpoint("llama", tmp_path)
    config = EngineConfig(model=str(model), device="oracle", dtype="float32", threads=1)
    engine = await AsyncEngine.start(config)
    await engine.wait_ready()

    async def answer() -> list[int]:
        prompt, last = PromptTokens(text=None, token_ids=[9, 8, 7]), None
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
        async for output in engine.generate(prompt, params):
            last = output
        assert isinstance(last, RequestOutput)
        assert last.finished
        return list(last.outputs[0].token_ids)

    try:
        want = await answer()
        assert engine.engine_pid is not None
        os.kill(engine.engine_pid, signal.SIGKILL)
        coming = []
        for _ in range(40):  # before the end is noticed, while it is, and afterwards
            coming.append(asyncio.create_task(answer()))
            await asyncio.sleep(0.01)
        assert await asyncio.wait_for(asyncio.gather(*coming), 60) == [want] * 40
    finally:
        await engine.close()
