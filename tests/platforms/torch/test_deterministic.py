"""Deterministic mode through the whole engine: the same bits on every path."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from dovetail.core.errors import SelectionError, UnsupportedError
from dovetail.core.request import SamplingParams
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.engines import Answer, answer, make_core
from tests.thorough import every, thorough

PARAMS = SamplingParams(temperature=0.0, max_tokens=16, logprobs=3)
SAMPLED = SamplingParams(temperature=0.9, top_p=0.95, max_tokens=16, logprobs=3)
OVERRIDES: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 32}}
WIDE = {"hidden_size": 896, "intermediate_size": 1200, "num_hidden_layers": 1, "vocab_size": 8192}
WIDE_HEADS = {"num_attention_heads": 14, "num_key_value_heads": 2}


def bits(answers: list[Answer]) -> list[tuple[list[int], bytes]]:
    """Tokens, and the bits of the log-probabilities of every alternative."""
    return [
        (
            a.token_ids,
            np.array(
                [lp for u in a.updates for entry in u.logprobs or () for lp in entry.logprobs],
                np.float32,
            ).tobytes(),
        )
        for a in answers
    ]


@dataclass(frozen=True)
class Case:
    path: Path
    dtype: str
    prompts: list[list[int]]
    params: list[SamplingParams]
    kv_dtype: str = "auto"

    def core(self, **settings: Any) -> Any:
        fixed = {"deterministic": True, "dtype": self.dtype, "kv_cache_dtype": self.kv_dtype}
        return make_core(self.path, "cpu", block_size=16, **fixed, **settings)

    def run(self, core: Any, first_id: int = 1) -> list[tuple[list[int], bytes]]:
        seeds = range(len(self.prompts))
        return bits(answer(core, self.prompts, self.params, first_id=first_id, seeds=list(seeds)))


def make_case(family: str, dtype: str, folder: Path, **overrides: Any) -> Case:
    path = make_checkpoint(family, folder, **overrides)
    rng = random.Random(0)
    shared = [rng.randrange(3, 250) for _ in range(40)]
    lengths = (1, 2, 3, 7, 16, 17, 33, 64, 129, 150)
    prompts = [[rng.randrange(3, 250) for _ in range(length)] for length in lengths]
    prompts += [[*shared, *(rng.randrange(3, 250) for _ in range(n))] for n in (1, 5, 30)]
    params = [PARAMS if i % 3 else SAMPLED for i in range(len(prompts))]
    return Case(path, dtype, prompts, params)


def check(case: Case) -> None:
    """Every path gives the bits that a request gets when it is alone and nothing is cached."""
    alone = case.run(case.core(max_num_seqs=1, enable_prefix_caching=False))
    core = case.core()
    assert case.run(core) == alone, "in one batch"
    assert case.run(core, 100) == alone, "with a warm prefix cache"
    assert core.scheduler.stats.prefix_cache_hits > 0
    seeds = list(range(len(case.prompts)))[::-1]
    turned = answer(core, case.prompts[::-1], case.params[::-1], first_id=200, seeds=seeds)
    assert bits(turned)[::-1] == alone, "on other rows"
    chunked = case.core(max_num_batched_tokens=16, max_num_seqs=8, async_scheduling=True)
    assert case.run(chunked) == alone, "in chunks of 16, one step ahead"
    tight = case.core(num_gpu_blocks_override=14, max_model_len=224)
    assert case.run(tight) == alone, "with preemption"
    assert tight.scheduler.stats.num_preemptions > 0


@pytest.mark.parametrize(
    ("family", "dtype"),
    every(3, zip(FAMILIES, itertools.cycle(["bfloat16", "float32"]), strict=False)),
)
def test_every_path_gives_the_same_bits(family: str, dtype: str, tmp_path: Path) -> None:
    check(make_case(family, dtype, tmp_path, **OVERRIDES.get(family, {})))


@pytest.mark.parametrize("kv_dtype", every(3, ["int8", "fp8_e4m3", "float16"]))
def test_a_cache_of_another_dtype(kv_dtype: str, tmp_path: Path) -> None:
    """What is near a boundary of rounding would show any difference of the last bit."""
    check(replace(make_case("qwen2", "bfloat16", tmp_path), kv_dtype=kv_dtype))


@thorough
def test_float16(tmp_path: Path) -> None:
    check(make_case("llama", "float16", tmp_path))


@pytest.mark.parametrize("dtype", every(2, ["float32", "bfloat16"]))
def test_a_wide_model(dtype: str, tmp_path: Path) -> None:
    case = make_case("qwen2", dtype, tmp_path, **WIDE, **WIDE_HEADS)
    short = [structs.replace(params, max_tokens=5) for params in case.params[6:]]
    check(replace(case, prompts=case.prompts[6:], params=short))


def test_log_probabilities_of_prompts(tmp_path: Path) -> None:
    case = make_case("llama", "bfloat16", tmp_path)
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=2)

    def read(**settings: Any) -> list[list[list[float]]]:
        answers = answer(case.core(**settings), case.prompts, params)
        return [
            [entry.logprobs for u in a.updates for entry in u.prompt_logprobs or ()]
            for a in answers
        ]

    whole = read(max_num_seqs=1)
    assert [len(entries) for entries in whole] == [len(prompt) - 1 for prompt in case.prompts]
    assert read(max_num_batched_tokens=16, max_num_seqs=8) == whole


def test_what_cannot_be_deterministic_says_why(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path)
    with pytest.raises(UnsupportedError, match="platform reference"):
        make_core(path, "reference", deterministic=True)
    with pytest.raises(UnsupportedError, match="only native models"):
        make_core(path, "cpu", deterministic=True, model_impl="transformers")
    with pytest.raises(SelectionError, match="'sdpa' cannot serve this"):
        make_core(path, "cpu", deterministic=True, attention_backend="sdpa")
    assert "invariant" in make_core(path, "cpu", deterministic=True).runner.describe()["attention"]
