"""Completions that are chosen at the end: ``best_of``, and the outcome of a beam search."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from dovetail import LLM, AsyncEngine, EngineConfig, PromptTokens, RequestOutput, SamplingParams
from dovetail.core.engine.api import CompletionDelta, EngineStats, RequestDelta
from dovetail.core.engine.chosen import BestOf
from dovetail.core.engine.messages import Outputs, decode_from_engine, encode
from dovetail.core.engine.outputs import OutputProcessor
from dovetail.core.errors import RequestFailedError
from dovetail.core.request import Logprob
from dovetail.core.update import Hypothesis, TokenAlternatives, Update
from tests.checkpoints import make_checkpoint


def delta(index: int, text: str, *logprobs: float, end: str | None = None) -> CompletionDelta:
    ids = list(range(len(logprobs)))
    return CompletionDelta(
        index=index,
        text=text,
        token_ids=ids,
        logprobs=[{i: Logprob(x, 1)} for i, x in enumerate(logprobs)],
        finish_reason=end,
    )


def test_the_mean_per_token_decides_and_not_the_sum() -> None:
    best = BestOf(SamplingParams(n=3, best_of=4, logprobs=0))
    best.add(delta(0, "a", -1.0))
    best.add(delta(1, "b", -0.5, -0.5, -0.5, end="length"))
    best.add(delta(0, "A", end="stop"))
    best.add(delta(2, "c", -2.0, end="stop"))
    best.add(delta(3, "d", -0.9, -1.1, end="stop"))
    chosen = best.best()
    assert [c.text for c in chosen] == ["b", "aA", "d"], "of equals the earlier first"
    assert [c.index for c in chosen] == [0, 1, 2]
    assert [c.finish_reason for c in chosen] == ["length", "stop", "stop"]
    assert [len(c.token_ids) for c in chosen] == [3, 1, 2]
    assert all(len(c.logprobs or ()) == len(c.token_ids) for c in chosen)


def test_scores_that_were_not_asked_for_are_not_shown() -> None:
    best = BestOf(SamplingParams(n=1, best_of=2))
    best.add(delta(0, "a", -1.0, end="stop"))
    best.add(delta(1, "", end="stop"))
    (chosen,) = best.best()
    assert chosen.text == "a" and chosen.logprobs is None


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path: Path = make_checkpoint("llama", tmp_path_factory.mktemp("llama"))
    return LLM(model=str(path), device="reference", dtype="float32")


@pytest.mark.parametrize("stop", [[], ["e"]])
def test_the_best_of_many_drawn_completions(llm: LLM, stop: list[str]) -> None:
    many = SamplingParams(n=8, seed=5, max_tokens=10, logprobs=0, stop=stop)
    few = SamplingParams(n=3, best_of=8, seed=5, max_tokens=10, stop=stop)
    (all_of_them,) = llm.generate("ship", many, use_tqdm=False)
    (best,) = llm.generate("ship", few, use_tqdm=False)
    ranked = sorted(
        all_of_them.outputs,
        key=lambda c: (c.cumulative_logprob or 0.0) / len(c.token_ids),
        reverse=True,
    )
    assert [c.token_ids for c in best.outputs] == [c.token_ids for c in ranked[:3]]
    assert [c.text for c in best.outputs] == [c.text for c in ranked[:3]]
    assert [c.index for c in best.outputs] == [0, 1, 2]
    assert best.finished and all(c.logprobs is None for c in best.outputs)
    assert llm.stats.num_free_blocks == llm.stats.num_blocks


def test_the_whole_vocabularys_log_probabilities(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    llm = LLM(model=str(path), device="reference", dtype="float32", max_logprobs=-1)
    params = SamplingParams(temperature=0.0, max_tokens=3, logprobs=-1, prompt_logprobs=30)
    (output,) = llm.generate("ship", params, use_tqdm=False)
    for entry in output.outputs[0].logprobs or ():
        assert len(entry) == 384
        assert sum(2.718281828459045**c.logprob for c in entry.values()) == pytest.approx(1.0)
    assert output.prompt_logprobs is not None and len(output.prompt_logprobs) > 2
    assert all(len(entry or ()) >= 30 for entry in output.prompt_logprobs[1:])


HYPOTHESES = [
    Hypothesis([4, 5], -1.5, "length", None, [TokenAlternatives([t], [-0.5], 1) for t in (4, 5)]),
    Hypothesis([4], -2.0, "stop", 9, [TokenAlternatives([4], [-0.5], 1)]),
    Hypothesis([], -2.5, "stop", None, []),
]
SEARCH = SamplingParams(n=2, best_of=3, use_beam_search=True, max_tokens=2, logprobs=0)


def test_the_outcome_of_a_search_comes_in_one_delta() -> None:
    processor = OutputProcessor(None)
    processor.add("r", PromptTokens(text=None, token_ids=[1, 2]), SEARCH, [7], [9])
    update = Update(
        id=7, token_ids=[], finish_reason="length", num_cached_tokens=1, beams=HYPOTHESES
    )
    message = decode_from_engine(encode(Outputs(updates=[update], stats=EngineStats())))
    assert isinstance(message, Outputs)
    result = processor.process(message.updates)
    [(name, found)] = result.deltas
    assert name == "r" and isinstance(found, RequestDelta) and not result.aborts
    assert found.finished and found.num_cached_tokens == 1
    assert [(c.index, c.token_ids) for c in found.completions] == [(0, [4, 5]), (1, [4])]
    assert [c.cumulative_logprob for c in found.completions] == [-1.5, -2.0]
    assert [c.finish_reason for c in found.completions] == ["length", "stop"]
    assert [c.stop_reason for c in found.completions] == [None, 9]
    assert not processor.is_open(7)


def test_a_search_that_fails_is_an_error_and_an_aborted_one_is_told_to_the_engine() -> None:
    processor = OutputProcessor(None)
    for name, number in (("r", 7), ("s", 8)):
        processor.add(name, PromptTokens(text=None, token_ids=[1]), SEARCH, [number], [9])
    failed = Update(id=7, token_ids=[], finish_reason="error", error="no luck")
    [(name, error)] = processor.process([failed]).deltas
    assert name == "r" and isinstance(error, RequestFailedError)
    assert processor.emitted(8) == []
    assert processor.abort("s") == [8]


async def _outcome(engine: AsyncEngine, params: SamplingParams) -> RequestOutput:
    prompt = PromptTokens(text=None, token_ids=[5, 6, 7])
    return [output async for output in engine.generate(prompt, params)][-1]


@pytest.mark.asyncio
async def test_a_new_engine_process_takes_searches_and_best_ofs_up(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    config = EngineConfig(model=str(path), device="cpu", dtype="float32", threads=1)
    engine = await AsyncEngine.start(config)
    await engine.wait_ready()
    each = [
        SamplingParams(n=4, use_beam_search=True, max_tokens=100, ignore_eos=True),
        SamplingParams(n=2, best_of=4, seed=1, max_tokens=100, ignore_eos=True),
    ]
    want = [await _outcome(engine, params) for params in each]
    tasks = [asyncio.create_task(_outcome(engine, params)) for params in each]
    pid = engine.engine_pid
    while not engine.stats.num_running:
        await asyncio.sleep(0.005)
    assert pid is not None and not any(task.done() for task in tasks)
    os.kill(pid, signal.SIGKILL)
    got = await asyncio.gather(*tasks)
    assert engine.engine_pid != pid
    await engine.close()
    for one, other in zip(got, want, strict=True):
        assert [c.token_ids for c in one.outputs] == [c.token_ids for c in other.outputs]
