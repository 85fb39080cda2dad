"""``best_of``: all are generated, the likeliest are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from dovetail import LLM, SamplingParams
from dovetail.core.engine.api import CompletionDelta
from dovetail.core.engine.chosen import BestOf
from dovetail.core.request import Logprob
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
