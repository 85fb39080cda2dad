"""Listeners hear of every sequence once at its beginning and once at its end, and harm nobody."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dovetail import LLM, AsyncEngine, EngineConfig, PromptTokens, SamplingParams
from dovetail.core.engine import listeners
from dovetail.core.faults import arm
from dovetail.core.plugins.entries import Entry
from dovetail.core.plugins.hooks import add_listener, hook_manager, hookimpl
from dovetail.core.request import Request
from tests.checkpoints import make_checkpoint

ENTRY = Entry(group="dovetail.hooks", name="ear", value="x", distribution="ears", version="1")
LONG = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)


class Ear:
    def __init__(self) -> None:
        self.started: list[int] = []
        self.finished: list[tuple[int, str, int]] = []
        self.steps: list[dict[str, float]] = []

    @hookimpl
    def dovetail_request_started(self, request: Request) -> None:
        self.started.append(request.id)

    @hookimpl
    def dovetail_request_finished(
        self, request: Request, finish_reason: str, num_generated: int, seconds: float
    ) -> None:
        assert 0 <= seconds < 100
        self.finished.append((request.id, finish_reason, num_generated))

    @hookimpl
    def dovetail_step_finished(self, stats: dict[str, float]) -> None:
        self.steps.append(dict(stats))


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ear]:
    ear, manager = Ear(), hook_manager({})
    add_listener(manager, ear, ENTRY)
    monkeypatch.setattr(listeners, "hook_manager", lambda environ: manager)
    yield ear
    arm({})


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


def make_llm(model: Path, **settings: Any) -> LLM:
    return LLM(model=str(model), device="oracle", **settings)


def test_llm_tells_of_requests_and_steps(model: Path, ear: Ear) -> None:
    llm = make_llm(model)
    params = SamplingParams(n=2, temperature=1.0, seed=1, max_tokens=7, ignore_eos=True)
    llm.generate([[5, 6], [7]], params, use_tqdm=False)
    assert sorted(ear.started) == [1, 2, 3, 4]
    assert sorted(ear.finished) == [(number, "length", 7) for number in (1, 2, 3, 4)]
    assert ear.steps[-1]["num_steps"] >= 7


def test_llm_tells_of_timeouts(model: Path, ear: Ear) -> None:
    llm = make_llm(model, options={"step_time": 0.01})
    llm.generate([[5, 6]], LONG, use_tqdm=False, timeout=0.1)
    [(number, reason, generated)] = ear.finished
    assert (number, reason) == (1, "timeout") and generated < 50


async def started(model: Path) -> AsyncEngine:
    config = EngineConfig(model=str(model), device="oracle", options={"step_time": 0.005})
    engine = await AsyncEngine.start(config)
    await engine.wait_ready()
    return engine


async def test_the_server_engine_tells_how_requests_end(model: Path, ear: Ear) -> None:
    engine = await started(model)
    prompt = PromptTokens(text=None, token_ids=[5, 6])
    async for _ in engine.stream(prompt, SamplingParams(max_tokens=3, ignore_eos=True)):
        continue
    stream = engine.stream(prompt, LONG)
    await anext(stream)
    await stream.aclose()
    arm({"DOVETAIL_FAULTS": "frontend.text:raise"})
    with pytest.raises(Exception, match="cannot be shown"):
        await anext(engine.stream(prompt, LONG))
    await engine.close()
    assert ear.started == [1, 2, 3]
    assert ear.finished[0] == (1, "length", 3)
    assert [reason for _, reason, _ in ear.finished] == ["length", "abort", "error"]
    assert ear.steps


async def test_a_listener_that_raises_harms_nobody(model: Path, ear: Ear) -> None:
    engine = await started(model)
    arm({"DOVETAIL_FAULTS": "hooks:raise"})
    prompt = PromptTokens(text=None, token_ids=[5, 6])
    params = SamplingParams(max_tokens=5, ignore_eos=True)

    async def count() -> int:
        deltas = [delta async for delta in engine.stream(prompt, params)]
        return sum(len(c.token_ids) for delta in deltas for c in delta.completions)

    assert await asyncio.gather(*(count() for _ in range(4))) == [5] * 4
    assert ear.started == []
    await engine.close()


def test_without_listeners_nothing_is_kept() -> None:
    silent = listeners.Listeners(hook_manager({}))
    silent.started("a", [])
    silent.stepped(lambda: pytest.fail("nobody listens"))
    assert not silent._open
