"""What is raised in one request's code ends that request; 31 others are the same, bit for bit."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from dovetail import LLM, AsyncEngine, EngineConfig, PromptTokens, RequestOutput, SamplingParams
from dovetail.core.errors import ConfigError, DovetailError, EngineDeadError
from dovetail.core.faults import POINTS, arm
from tests.checkpoints import make_checkpoint

COUNT, VICTIM = 32, 7
FRONT = ["frontend.deliver", "frontend.intake", "frontend.logprobs", "frontend.stop"]
FRONT += ["frontend.text"]
ENGINE = ["sampler.row", "scheduler.admit", "scheduler.result"]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm({})


def params(index: int) -> SamplingParams:
    """Everything for which there is code per request."""
    return SamplingParams(
        temperature=0.9,
        seed=index,
        max_tokens=12 + index % 5,
        min_tokens=6,
        logprobs=2,
        prompt_logprobs=1 if index % 2 else None,
        stop=["never said"],
        logit_bias={5: 1.0},
    )


async def one(engine: AsyncEngine, index: int) -> RequestOutput | DovetailError:
    prompt = PromptTokens(text=None, token_ids=[9, 8, 7, 10 + index, 6])
    last = None
    try:
        async for output in engine.generate(prompt, params(index), request_id="r"):
            last = output
    except DovetailError as error:
        return error
    assert last is not None and last.finished
    return last


async def all_of_them(engine: AsyncEngine) -> list[RequestOutput | DovetailError]:
    return await asyncio.gather(*(one(engine, index) for index in range(COUNT)))


async def started(model: Path, device: str) -> AsyncEngine:
    config = EngineConfig(
        model=str(model), device=device, dtype="float32", threads=1, max_num_seqs=COUNT
    )
    engine = await AsyncEngine.start(config)
    await engine.wait_ready()
    return engine


def check_others(
    results: list[RequestOutput | DovetailError],
    want: list[Any],
    victim: int,
    point: str,
    *,
    is_exact: bool = True,
) -> None:
    """``is_exact``: the logits do not depend on who else is in the step, to the last bit."""
    assert isinstance(results[victim], DovetailError), f"{point}: the victim was answered"
    assert f"a fault was ordered at {point}" in str(results[victim])
    for index, (result, wanted) in enumerate(zip(results, want, strict=True)):
        if index != victim:
            assert isinstance(result, RequestOutput), result
            assert [o.token_ids for o in result.outputs] == [o.token_ids for o in wanted.outputs]
            assert result.outputs[0].text == wanted.outputs[0].text
            if is_exact:
                assert result.outputs == wanted.outputs
                assert result.prompt_logprobs == wanted.prompt_logprobs


async def check_left_whole(engine: AsyncEngine, pid: int | None) -> None:
    for _ in range(100):
        if not (engine.stats.num_running or engine.stats.num_waiting):
            break
        await asyncio.sleep(0.02)
    assert engine.engine_pid == pid and engine.stats.num_restarts == 0
    assert engine.stats.num_free_blocks == engine.stats.num_blocks


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def engine(model: Path) -> AsyncIterator[AsyncEngine]:
    engine = await started(model, "oracle")
    yield engine
    await engine.close()


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def want(engine: AsyncEngine) -> list[RequestOutput]:
    """The answers without a fault."""
    return [result for result in await all_of_them(engine) if isinstance(result, RequestOutput)]


@pytest.mark.parametrize("point", FRONT)
async def test_a_fault_in_the_front_end_ends_one_request(
    engine: AsyncEngine, want: list[RequestOutput], point: str
) -> None:
    assert len(want) == COUNT
    pid = engine.engine_pid
    first = next(engine._intake._ids) + 1
    arm({"DOVETAIL_FAULTS": f"{point}:raise@2@req={first + VICTIM}"})
    if point == "frontend.intake":
        arm({"DOVETAIL_FAULTS": f"{point}:raise@req={first + VICTIM}"})
    results = await all_of_them(engine)
    check_others(results, want, VICTIM, point)
    await check_left_whole(engine, pid)


@pytest.mark.parametrize("device", ["oracle", "cpu"])
@pytest.mark.parametrize("point", ENGINE)
async def test_a_fault_in_the_engine_process_ends_one_request(
    model: Path, monkeypatch: pytest.MonkeyPatch, point: str, device: str
) -> None:
    """The first 32 requests are the ones without a fault, the victim is among the next."""
    if device == "cpu" and point == "scheduler.admit":
        pytest.skip("nothing of the platform has a part in it")
    victim = COUNT + 1 + VICTIM
    monkeypatch.setenv("DOVETAIL_FAULTS", f"{point}:raise@1@req={victim}")
    engine = await started(model, device)
    try:
        want = await all_of_them(engine)
        results = await all_of_them(engine)
        check_others(results, want, VICTIM, point, is_exact=device == "oracle")
        await check_left_whole(engine, engine.engine_pid)
    finally:
        await engine.close()


async def test_every_point_that_is_per_request_is_tried() -> None:
    named = {name for name, text in POINTS.items() if text.endswith("per request")}
    assert named == {*FRONT, *ENGINE}


async def test_a_wrong_order_stops_the_start(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOVETAIL_FAULTS", "engine.lop:raise")
    with pytest.raises(ConfigError, match="points: engine"):
        await AsyncEngine.start(EngineConfig(model=str(model), device="oracle"))
    with pytest.raises(ConfigError, match="points: engine"):
        LLM(model=str(model), device="oracle")


@pytest.mark.parametrize(
    "order", ["engine.outbox:corrupt@9", "pool.allocate:raise@3", "engine.loop:kill@12"]
)
async def test_a_fault_of_the_whole_process_is_a_preemption(
    model: Path, monkeypatch: pytest.MonkeyPatch, want: list[RequestOutput], order: str
) -> None:
    """Another process takes the requests up; each process is hit once, so two may be needed."""
    monkeypatch.setenv("DOVETAIL_FAULTS", order)
    engine = await started(model, "oracle")
    monkeypatch.delenv("DOVETAIL_FAULTS")
    try:
        results = await all_of_them(engine)
        assert engine.stats.num_restarts == 1
        for result, wanted in zip(results, want, strict=True):
            assert isinstance(result, RequestOutput), result
            assert result.outputs[0].token_ids == wanted.outputs[0].token_ids
    finally:
        await engine.close()


@pytest.mark.parametrize("point", ["runner.step", "runner.result"])
async def test_a_step_that_fails_changes_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch, want: list[RequestOutput], point: str
) -> None:
    monkeypatch.setenv("DOVETAIL_FAULTS", f"{point}:raise@6")
    engine = await started(model, "oracle")
    try:
        results = await all_of_them(engine)
        assert engine.stats.num_restarts == 0
        tokens = [r.outputs[0].token_ids for r in results if isinstance(r, RequestOutput)]
        assert tokens == [w.outputs[0].token_ids for w in want]
    finally:
        await engine.close()


async def test_an_engine_that_cannot_start_says_so(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOVETAIL_FAULTS", "engine.loop:raise@1")
    engine = await AsyncEngine.start(EngineConfig(model=str(model), device="oracle"))
    for _ in range(500):
        if engine.status.state == "dead":
            break
        await asyncio.sleep(0.02)
    with pytest.raises(EngineDeadError, match=r"a fault was ordered at engine\.loop"):
        await engine.wait_ready()
    await engine.close()
