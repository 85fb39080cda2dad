"""KV caches of one byte per entry through the whole engine: how far answers move."""

from __future__ import annotations

import bisect
import heapq
import inspect
import math
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from dovetail.core.demo import demo_model_path
from dovetail.core.request import SamplingParams
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core

KV_DTYPES = ("int8", "fp8_e4m3", "fp8_e5m2")
PERPLEXITY = {"int8": 1.002, "fp8_e4m3": 1.004, "fp8_e5m2": 1.008}
"""Largest ratio to the perplexity with a float32 cache, of the bundled model on Python source."""
FIRST_TOKENS = {"int8": (5, 0.05), "fp8_e4m3": (3, 0.25), "fp8_e5m2": (3, 0.6)}
"""Of five first tokens of a random model, how many stay, and how far their log-probabilities move.
Its logits lie closer together than those of any model that was trained."""
READING = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
LENGTHS = (3, 17, 40, 100, 150)


@pytest.fixture(scope="module")
def texts() -> list[list[int]]:
    tokenizer = Tokenizer.from_file(str(demo_model_path() / "tokenizer.json"))
    return [tokenizer.encode(inspect.getsource(m)).ids[:700] for m in (heapq, bisect)]


def perplexity(texts: list[list[int]], **settings: Any) -> float:
    core = make_core(demo_model_path(), "cpu", **settings)
    losses = [
        -entry.logprobs[0]
        for a in answer(core, texts, READING)
        for update in a.updates
        for entry in update.prompt_logprobs or ()
    ]
    assert len(losses) == sum(len(text) - 1 for text in texts)
    return math.exp(sum(losses) / len(losses))


@pytest.fixture(scope="module")
def exact(texts: list[list[int]]) -> float:
    found = perplexity(texts)
    assert found < 60, "the bundled model does not know Python"
    return found


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_perplexity_of_the_bundled_model(
    texts: list[list[int]], exact: float, kv_dtype: str
) -> None:
    ratio = perplexity(texts, kv_cache_dtype=kv_dtype) / exact
    assert ratio != 1
    assert 1 / PERPLEXITY[kv_dtype] < ratio < PERPLEXITY[kv_dtype]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint("qwen2", tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("platform", ["cpu", "reference"])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_first_tokens_of_a_tiny_model(tiny: Path, kv_dtype: str, platform: str) -> None:
    prompts = [[7 + (i * i) % 240 for i in range(length)] for length in LENGTHS]
    params = SamplingParams(temperature=0.0, max_tokens=1, logprobs=0)
    want = answer(make_core(tiny, platform), prompts, params)
    got = answer(make_core(tiny, platform, kv_cache_dtype=kv_dtype), prompts, params)
    pairs = list(zip(got, want, strict=True))
    moved = [abs(a.logprobs[0] - b.logprobs[0]) for a, b in pairs if a.token_ids == b.token_ids]
    least, furthest = FIRST_TOKENS[kv_dtype]
    assert len(moved) >= least
    assert 1e-4 < max(moved) < furthest


def test_fp8_is_a_name_for_e4m3_and_a_block_costs_about_half(tiny: Path) -> None:
    runners = [
        make_core(tiny, "cpu", dtype="bfloat16", kv_cache_dtype=kv_dtype).runner
        for kv_dtype in ("auto", "fp8", "fp8_e4m3", "int8")
    ]
    plain, *coded = [runner.cache_spec().bytes_per_block for runner in runners]
    assert set(coded) == {plain * (16 + 2) // (2 * 16)}
