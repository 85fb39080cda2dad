"""The library's own models over paged attention: the tokens of the library's generate, or a reason."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from dovetail.core.engine.core import EngineCore
from dovetail.core.errors import UnsupportedError
from dovetail.core.request import SamplingParams
from tests.checkpoints import FAMILIES, randomise
from tests.engines import answer, make_core

LENGTHS = (3, 17, 33, 50)
NUM_NEW = 24
GREEDY = SamplingParams(temperature=0.0, max_tokens=NUM_NEW)

PLAIN: dict[str, Any] = {
    "vocab_size": 384,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
}
GROUPED = {**PLAIN, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED = {"shared_expert_intermediate_size": 32}

RUN: dict[str, tuple[str, dict[str, Any]]] = {
    **{f"native {family}": (family, settings) for family, settings in FAMILIES.items()},
    "bloom": ("bloom", PLAIN | {"n_layer": 2, "n_head": 4, "seq_length": 512}),
    "bloom, 6 heads": ("bloom", PLAIN | {"hidden_size": 96, "num_attention_heads": 6}),
    "codegen": ("codegen", PLAIN | {"n_ctx": 512, "rotary_dim": 8, "n_inner": 96}),
    "cohere": ("cohere", GROUPED | {"logit_scale": 0.25, "use_qk_norm": True}),
    "cohere2": ("cohere2", GROUPED | {"sliding_window": 32, "num_hidden_layers": 4}),
    "exaone4": ("exaone4", GROUPED | {"sliding_window": 32, "sliding_window_pattern": 2}),
    "falcon 40b": ("falcon", PLAIN | {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon 7b": ("falcon", PLAIN | {"multi_query": True}),
    "falcon rw": ("falcon", PLAIN | {"multi_query": False, "alibi": True, "parallel_attn": False}),
    "gemma": ("gemma", GROUPED | {"head_dim": 16}),
    "gemma3": (
        "gemma3_text",
        GROUPED | {"head_dim": 16, "sliding_window": 32, "query_pre_attn_scalar": 24},
    ),
    "glm": ("glm", GROUPED | {"head_dim": 16}),
    "glm4": ("glm4", GROUPED | {"head_dim": 16}),
    "gpt-j": ("gptj", PLAIN | {"rotary_dim": 8}),
    "gpt-neox": ("gpt_neox", PLAIN),
    "granite": (
        "granite",
        GROUPED
        | {"logits_scaling": 4.0, "embedding_multiplier": 3.0, "attention_multiplier": 0.2},
    ),
    "granitemoe": ("granitemoe", GROUPED | LOCAL),
    "helium": ("helium", GROUPED | {"head_dim": 16}),
    "mixtral": ("mixtral", GROUPED | LOCAL),
    "mpt": ("mpt", PLAIN | {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 512}),
    "olmo2": ("olmo2", GROUPED),
    "olmoe": ("olmoe", GROUPED | EXPERTS),
    "phi": ("phi", GROUPED),
    "qwen2-moe": ("qwen2_moe", GROUPED | EXPERTS | SHARED),
    "qwen3-moe": ("qwen3_moe", GROUPED | EXPERTS | {"head_dim": 16}),
    "smollm3": ("smollm3", GROUPED | {"num_hidden_layers": 4}),
    "stablelm": ("stablelm", GROUPED),
    "starcoder2": ("starcoder2", GROUPED | {"sliding_window": 32}),
}


def save(model_type: str, settings: dict[str, Any], path: Path) -> Any:
    """A random checkpoint of the library's own class, and the model."""
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config).eval()
    randomise(model, seed=0)
    model.save_pretrained(path)
    return model


def prompts() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(3, 250) for _ in range(length)] for length in LENGTHS]


def generate(model: Any, prompt: list[int]) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]),
        max_new_tokens=NUM_NEW,
        min_new_tokens=NUM_NEW,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def load(path: Path, platform: str = "cpu", **settings: Any) -> EngineCore:
    return make_core(path, platform, model_impl="transformers", **settings)


@pytest.mark.parametrize("name", RUN)
def test_tokens_equal_generate(name: str, tmp_path: Path) -> None:
    model = save(*RUN[name], tmp_path)
    wanted = [generate(model, prompt) for prompt in prompts()]
    assert len({tuple(tokens) for tokens in wanted}) > 1, "it says the same to everybody"
    core = load(tmp_path, max_num_batched_tokens=16, max_num_seqs=4, block_size=8)
    cold = answer(core, prompts(), GREEDY)
    assert [a.token_ids for a in cold] == wanted
    warm = answer(core, prompts(), GREEDY, first_id=10)
    assert [a.token_ids for a in warm] == wanted
    assert core.scheduler.stats.prefix_cache_hits > 0
