"""Every native family through the whole engine: the tokens of transformers, whatever the path."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs
from transformers import AutoModelForCausalLM

from tests.checkpoints import make_checkpoint
from tests.engines import GREEDY, answer, make_core
from tests.thorough import every, thorough

FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "opt", "gpt2"]
OVERRIDES: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 32}}
NUM_NEW = 40
PARAMS = structs.replace(GREEDY, max_tokens=NUM_NEW)
LENGTHS = (1, 3, 7, 16, 33, 64, 100, 150)


@dataclass(frozen=True)
class Case:
    path: Path
    prompts: list[list[int]]
    tokens: list[list[int]]
    logprobs: list[list[float]]


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp(request.param)
    path = make_checkpoint(request.param, folder, **OVERRIDES.get(request.param, {}))
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 250) for _ in range(length)] for length in LENGTHS]
    tokens, logprobs = [], []
    for prompt in prompts:
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=NUM_NEW,
            min_new_tokens=NUM_NEW,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
        new = out.sequences[0, len(prompt) :]
        table = torch.stack(out.logits)[:, 0].float().log_softmax(-1)
        tokens.append(new.tolist())
        logprobs.append(table.gather(1, new[:, None])[:, 0].tolist())
    assert len({tuple(t) for t in tokens}) > 4, "the checkpoint says the same to everybody"
    return Case(path, prompts, tokens, logprobs)


PATHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "chunks of 16": {"max_num_batched_tokens": 16, "max_num_seqs": 8},
    "preemption": {"block_size": 16, "num_gpu_blocks_override": 20, "max_model_len": 224},
    "no prefix cache": {"enable_prefix_caching": False},
    "one step ahead": {"async_scheduling": True},
    "one at a time": {"max_num_seqs": 1},
}


WAYS = [*((path, "cpu") for path in PATHS), ("plain", "reference"), ("preemption", "reference")]
OFTEN = {(family, *way) for i, family in enumerate(FAMILIES) for way in (WAYS[0], WAYS[i % 8])}


@pytest.mark.parametrize(
    ("case", "path", "platform"),
    [
        pytest.param(*each, marks=() if each in OFTEN else thorough)
        for each in ((family, *way) for family in FAMILIES for way in WAYS)
    ],
    indirect=["case"],
)
def test_tokens_equal_transformers(case: Case, path: str, platform: str) -> None:
    core = make_core(case.path, platform, **PATHS[path])
    answers = answer(core, case.prompts, PARAMS)
    assert [a.token_ids for a in answers] == case.tokens
    worst = max(
        abs(x - y)
        for a, want in zip(answers, case.logprobs, strict=True)
        for x, y in zip(a.logprobs, want, strict=True)
    )
    assert worst < 1e-4
    if path == "preemption":
        assert core.scheduler.stats.num_preemptions > 0


@pytest.mark.parametrize("case", every(3, FAMILIES), indirect=True)
def test_a_warm_prefix_cache_changes_nothing(case: Case) -> None:
    core = make_core(case.path, "cpu", block_size=16)
    cold = answer(core, case.prompts, PARAMS)
    warm = answer(core, case.prompts, PARAMS, first_id=100)
    assert core.scheduler.stats.prefix_cache_hits > 0
    assert [a.token_ids for a in cold] == case.tokens
    assert [a.token_ids for a in warm] == case.tokens
