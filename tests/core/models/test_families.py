"""Every family against the transformers library: logits of whole sequences, in float32."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dovetail.core.contracts.model import Model
from dovetail.core.contracts.ops import OpTable
from dovetail.core.errors import CheckpointError, UnsupportedError
from dovetail.core.models.registry import find_model
from dovetail.platforms.torch.ops import references
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.core.models.harness import (
    config_of,
    model_of,
    our_logits,
    random_tokens,
    transformers_logits,
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}
LINEAR = {"rope_type": "linear", "factor": 2.0}
SLIDING, FULL = "sliding_attention", "full_attention"
SHORT = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5]
LONG = [1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def longrope(**more: Any) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.75,
        "short_factor": SHORT,
        "long_factor": LONG,
        **more,
    }


CASES: list[tuple[str, str, dict[str, Any]]] = [
    ("llama", "grouped", {}),
    ("llama", "tied", {"tie_word_embeddings": True}),
    ("llama", "all heads, wide", {"num_key_value_heads": 4, "head_dim": 32}),
    ("llama", "one kv head", {"num_key_value_heads": 1}),
    ("llama", "biases", {"attention_bias": True, "mlp_bias": True}),
    ("llama", "gelu", {"hidden_act": "gelu_pytorch_tanh"}),
    ("llama", "llama3 rope", {"rope_parameters": LLAMA3}),
    ("llama", "yarn", {"rope_parameters": YARN}),
    ("llama", "linear", {"rope_parameters": LINEAR}),
    ("mistral", "no window", {}),
    ("mistral", "window", {"sliding_window": 16}),
    ("mistral", "window, head_dim", {"sliding_window": 33, "head_dim": 24}),
    ("qwen2", "plain", {}),
    ("qwen2", "tied", {"tie_word_embeddings": True}),
    (
        "qwen2",
        "window from a layer on",
        {
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 1,
            "num_hidden_layers": 3,
        },
    ),
    (
        "qwen2",
        "layer types",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": [SLIDING, FULL]},
    ),
    ("qwen2", "yarn", {"rope_parameters": YARN}),
    ("qwen3", "plain", {}),
    ("qwen3", "bias, tied, wide", {"attention_bias": True, "head_dim": 32}),
    (
        "qwen3",
        "layer types",
        {"use_sliding_window": True, "sliding_window": 16, "layer_types": [FULL, SLIDING]},
    ),
    ("phi3", "plain", {}),
    ("phi3", "window", {"sliding_window": 16}),
    (
        "phi3",
        "partial",
        {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    ),
    (
        "phi3",
        "longrope long",
        {"rope_parameters": longrope(), "original_max_position_embeddings": 64},
    ),
    ("phi3", "longrope short", {"rope_parameters": longrope()}),
    ("gemma2", "plain", {}),
    ("gemma2", "four layers, narrow window", {"num_hidden_layers": 4, "sliding_window": 8}),
    ("gemma2", "tight caps", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}),
    ("gemma2", "no caps", {"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    ("gemma2", "layer types, bias", {"layer_types": [FULL, SLIDING], "attention_bias": True}),
    ("gemma2", "untied", {"tie_word_embeddings": False, "head_dim": 32}),
    ("opt", "plain", {}),
    ("opt", "norm after, projected", {"do_layer_norm_before": False, "word_embed_proj_dim": 32}),
    ("opt", "norm before, projected", {"word_embed_proj_dim": 32}),
    ("opt", "no last norm", {"_remove_final_layer_norm": True}),
    (
        "opt",
        "galactica",
        {
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "activation_function": "gelu",
        },
    ),
    ("opt", "untied", {"tie_word_embeddings": False}),
    ("gpt2", "plain", {}),
    (
        "gpt2",
        "by layer",
        {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True},
    ),
    ("gpt2", "unscaled, relu", {"scale_attn_weights": False, "activation_function": "relu"}),
    ("gpt2", "inner left out, untied", {"n_inner": None, "tie_word_embeddings": False}),
]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [pytest.param(family, more, id=f"{family}: {name}") for family, name, more in CASES],
)
def test_logits_agree(
    family: str, overrides: dict[str, Any], tmp_path: Path, record_property: Any
) -> None:
    path = make_checkpoint(family, tmp_path, **copy.deepcopy(overrides))
    tokens = random_tokens(150)
    theirs = transformers_logits(path, tokens)
    difference = float((our_logits(path, tokens) - theirs).abs().max())
    record_property("difference", difference)
    assert float(theirs.std()) > 0.05, "the checkpoint is degenerate"
    assert difference < 1e-4


LONG_CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}),
    ("mistral", {"sliding_window": 256}),
    ("phi3", {"rope_parameters": longrope(), "original_max_position_embeddings": 64}),
]


@pytest.mark.parametrize(("family", "overrides"), LONG_CASES)
def test_logits_agree_at_positions_of_several_thousands(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    more = {"max_position_embeddings": 4096, "num_hidden_layers": 1, **copy.deepcopy(overrides)}
    path = make_checkpoint(family, tmp_path, **more)
    tokens = random_tokens(2600)
    ours = our_logits(path, tokens, max_model_len=4096)
    assert float((ours - transformers_logits(path, tokens)).abs().max()) < 1e-4


def test_dynamic_rope_agrees_with_decoding_one_token_at_a_time(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    path = make_checkpoint("llama", tmp_path, rope_parameters=rope, max_position_embeddings=40)
    tokens = random_tokens(100)
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    rows, cache = [], None
    with torch.no_grad():
        for piece in (tokens[:40], *tokens[40:].split(1)):
            out = model(piece[None].long(), past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            rows.append(out.logits[0])
    difference = (our_logits(path, tokens, max_model_len=160) - torch.cat(rows)).abs().max()
    assert float(difference) < 1e-4


def test_configs_of_before_transformers_5(tmp_path: Path) -> None:
    path = make_checkpoint("llama", tmp_path, rope_parameters=LLAMA3)
    tokens = random_tokens(150)
    theirs = transformers_logits(path, tokens)
    config = config_of(path)
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    (path / "config.json").write_text(json.dumps(config))
    assert float((our_logits(path, tokens) - theirs).abs().max()) < 1e-4


def test_gemma2_scales_the_embedding_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    path = make_checkpoint("gemma2", tmp_path, hidden_size=60)
    model = model_of(path, 512)
    table = torch.randn(384, 60).bfloat16()
    embedded = model.embedded(OpTable(references()).bind(), {"embed": table}, torch.arange(9))
    expected = table[:9] * torch.tensor(60**0.5, dtype=torch.bfloat16)
    assert embedded.dtype == torch.bfloat16
    assert torch.equal(embedded, expected)


def test_a_window_that_no_sequence_outgrows_is_left_out(tmp_path: Path) -> None:
    path = make_checkpoint("mistral", tmp_path, sliding_window=32)
    assert [spec.window for spec in model_of(path, 32).attention_specs()] == [None, None]
    assert [spec.window for spec in model_of(path, 33).attention_specs()] == [32, 32]


def made(family: str, **changes: Any) -> Model:
    """A model from the family's config with changes; a change to None takes the key away."""
    config = AutoConfig.for_model(family, **FAMILIES[family]).to_dict()
    config = {key: value for key, value in {**config, **changes}.items() if value is not None}
    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    family_class = find_model([architecture])
    assert family_class is not None
    return family_class.from_config(config, max_model_len=128)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_a_missing_key_is_named(family: str) -> None:
    key = "n_embd" if family == "gpt2" else "hidden_size"
    with pytest.raises(CheckpointError, match=f"lacks '{key}'"):
        made(family, **{key: None})


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"hidden_act": "relu6"}, "hidden_act = 'relu6'"),
        ("llama", {"rope_parameters": {"rope_type": "spiral"}}, "'spiral'.*known: default, linear"),
        ("qwen2", {"layer_types": ["linear_attention"] * 2}, "layer_types = 'linear_attention'"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention = True"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention = True"),
        ("gpt2", {"n_positions": 64}, "max_model_len 128 .* 64 positions"),
        ("opt", {"activation_function": "tanh"}, "activation_function = 'tanh'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(
    family: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedError, match=message):
        made(family, **changes)


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"num_key_value_heads": 3}, "num_key_value_heads"),
        ("llama", {"vocab_size": "384"}, "'vocab_size' = '384'.*an integer of at least 1"),
        ("llama", {"attention_bias": 1}, "true or false"),
        ("llama", {"rms_norm_eps": 0}, "a number above 0"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 2}, "use_sliding_window"),
        ("qwen2", {"layer_types": ["full_attention"]}, "a list of 2 strings"),
        ("opt", {"num_attention_heads": 5}, "multiple"),
        ("gpt2", {"n_head": 5}, "multiple"),
    ],
)
def test_wrong_settings_are_named(family: str, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        made(family, **changes)


def test_models_import_neither_torch_nor_jax_nor_transformers() -> None:
    code = (
        "import sys; from dovetail.core.models.registry import *;"
        "[find_model([name]) for name in native_architectures()];"
        "import dovetail.core.models.weights;"
        "print(sorted({'torch', 'jax', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
