"""Speculative decoding over real models: the tokens of the engine without it, greedy or sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dovetail.core.demo import demo_model_path
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import SamplingParams
from dovetail.core.tokenizer import load_tokenizer
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core
from tests.thorough import diagonal

PARAMS = [
    SamplingParams(temperature=0.0, max_tokens=48),
    SamplingParams(temperature=0.8, max_tokens=48),
    SamplingParams(temperature=1.0, top_p=0.9, top_k=40, max_tokens=40, logprobs=3),
    SamplingParams(temperature=0.0, repetition_penalty=1.3, max_tokens=48),
    SamplingParams(temperature=0.7, frequency_penalty=0.4, presence_penalty=0.2, max_tokens=40),
    SamplingParams(temperature=0.0, logit_bias={5: 2.0, 9: -3.0}, max_tokens=30, logprobs=2),
    SamplingParams(temperature=0.5, min_p=0.05, max_tokens=1),
    SamplingParams(temperature=0.6, max_tokens=2, prompt_logprobs=1),
]
"""Most kinds of request at once; those with penalties are checked place by place."""


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("llama", tmp_path_factory.mktemp("target"), seed=1)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("draft")
    return make_checkpoint("qwen2", folder, seed=2, vocab_size=400, num_hidden_layers=1)


def prompts() -> list[list[int]]:
    period = [7, 21, 35, 49, 63]
    return [[*(period * 12)[: 20 + 5 * i], 100 + i % 3] for i in range(len(PARAMS))]


def methods(target: Path, other: Path) -> dict[str, dict[str, Any]]:
    return {
        "ngram": {"method": "ngram", "shortest_match": 1},
        "suffix": {"method": "suffix", "min_token_prob": 0.0},
        "itself": {"model": str(target), "num_speculative_tokens": 3},
        "another": {"model": str(other), "num_speculative_tokens": 6},
    }


def told(core: EngineCore) -> list[Any]:
    answers = answer(core, prompts(), PARAMS, seeds=range(len(PARAMS)))
    counts = [[len(e.logprobs) for u in a.updates for e in u.logprobs or ()] for a in answers]
    return [(a.token_ids, count) for a, count in zip(answers, counts, strict=True)]


@pytest.fixture(scope="module")
def wanted(target: Path) -> list[Any]:
    return told(make_core(target, "reference"))


@pytest.mark.parametrize(
    ("method", "platform"),
    diagonal(["ngram", "suffix", "itself", "another"], ["reference", "cpu"]),
)
def test_the_tokens_are_those_without_it(
    method: str, platform: str, target: Path, other: Path, wanted: list[Any]
) -> None:
    config = {**methods(target, other)[method], "adaptive": False}
    core = make_core(target, platform, speculative_config=config)
    assert told(core) == wanted
    stats = core.stats()
    assert stats.num_draft_tokens > 0
    if method == "itself":
        greedy_share = stats.num_accepted_tokens / stats.num_draft_tokens
        assert greedy_share > 0.3, "a model agrees with itself wherever nothing is drawn"


PATHS: list[dict[str, Any]] = [
    {"max_num_batched_tokens": 24, "max_num_seqs": 8},
    {"num_gpu_blocks_override": 22, "block_size": 16, "max_model_len": 128},
    {"async_scheduling": True},
    {"enable_prefix_caching": False},
]


@pytest.mark.parametrize(("method", "settings"), diagonal(["ngram", "itself"], PATHS))
def test_on_every_path(
    method: str, settings: dict[str, Any], target: Path, other: Path, wanted: list[Any]
) -> None:
    config = methods(target, other)[method]
    core = make_core(target, "cpu", speculative_config=config, **settings)
    assert told(core) == wanted
    assert told(core) == wanted, "with what the first round left in the cache"


def test_a_draft_model_that_is_the_model_itself_is_right_when_greedy(target: Path) -> None:
    config = {"model": str(target), "num_speculative_tokens": 4, "adaptive": False}
    core = make_core(target, "reference", speculative_config=config)
    params = SamplingParams(temperature=0.0, max_tokens=60)
    answer(core, prompts(), params)
    stats = core.stats()
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 100


def test_repetitive_text_takes_fewer_steps() -> None:
    model = demo_model_path()
    code = "def total(values):\n    result = 0\n    for value in values:\n        result += value\n"
    prompt = load_tokenizer(model).encode(code * 3)
    params = SamplingParams(temperature=0.0, max_tokens=96)
    steps, tokens = {}, {}
    for name, config in {"none": {}, "ngram": {"method": "ngram", "adaptive": False}}.items():
        core = make_core(model, "cpu", speculative_config=config)
        tokens[name] = answer(core, [prompt], params)[0].token_ids
        steps[name] = core.stats().num_steps
    assert tokens["ngram"] == tokens["none"]
    assert steps["ngram"] < 0.7 * steps["none"]
