"""Tiny models of every native family, as data, and the folders that they are written to.

Weights are drawn wide, and norm weights have random signs, so that answers differ between prompts
and no model simply repeats its last token.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.core.conformance.numpy_ops import NumpyArray
from dovetail.core.contracts.model import Linear, Model, Tensor
from dovetail.core.errors import PluginError
from dovetail.core.models.registry import find_model
from dovetail.core.models.shard import DTYPES
from dovetail.core.models.weights import leaves, needs

__all__ = [
    "FAMILIES",
    "MAX_MODEL_LEN",
    "VOCAB_SIZE",
    "make_model",
    "write_checkpoint",
    "write_file",
]

VOCAB_SIZE = 384
MAX_MODEL_LEN = 256
"""Positions of every model."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_MODEL_LEN,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 2,
    "dtype": "float32",
}
_GATED: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}

FAMILIES: Mapping[str, dict[str, Any]] = {
    "llama": {**_GATED, "architectures": ["LlamaForCausalLM"]},
    "mistral": {**_GATED, "architectures": ["MistralForCausalLM"], "sliding_window": 40},
    "qwen2": {**_GATED, "architectures": ["Qwen2ForCausalLM"]},
    "qwen3": {**_GATED, "architectures": ["Qwen3ForCausalLM"], "head_dim": 32},
    "phi3": {
        **_GATED,
        "architectures": ["Phi3ForCausalLM"],
        "original_max_position_embeddings": MAX_MODEL_LEN,
    },
    "gemma2": {
        **_GATED,
        "architectures": ["Gemma2ForCausalLM"],
        "hidden_activation": "gelu_pytorch_tanh",
        "head_dim": 16,
        "query_pre_attn_scalar": 24,
        "sliding_window": 32,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    "opt": {
        **_COMMON,
        "architectures": ["OPTForCausalLM"],
        "ffn_dim": 96,
        "word_embed_proj_dim": 64,
        "activation_function": "relu",
        "do_layer_norm_before": True,
    },
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": VOCAB_SIZE,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 96,
        "n_positions": MAX_MODEL_LEN,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
    },
}
"""The ``config.json`` of each, without ``model_type``, which is the key."""

SEEDS: Mapping[str, int] = {
    "llama": 10,
    "mistral": 10,
    "qwen2": 9,
    "qwen3": 14,
    "phi3": 6,
    "gemma2": 8,
    "opt": 8,
    "gpt2": 14,
}
"""Of each family's weights: of two dozen, one whose answers to the kit's prompts have the clearest
choices, so that a token other than the oracle's is never a matter of rounding in float32."""


def make_model(config: Mapping[str, Any]) -> Model:
    """The definition that a config names. Raises PluginError if Dovetail's own is not installed."""
    family = find_model(config["architectures"])
    if family is None:
        raise PluginError(
            f"no model is installed for {config['architectures']}; install Dovetail again."
        )
    return family.from_config(config, max_model_len=MAX_MODEL_LEN)


def write_checkpoint(family: str, folder: Path) -> Path:
    """Write the model of the family under ``folder``; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model_type": family, **FAMILIES[family]}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    write_file(folder / "model.safetensors", _weights(make_model(config), SEEDS[family]))
    return folder


def _weights(model: Model, seed: int) -> dict[str, NumpyArray]:
    """Every tensor that the model declares, float32, by its name in the checkpoint."""
    tree = model.weights()
    shapes = needs(tree)
    offsets = {leaf.source: leaf.offset for _, leaf in leaves(tree) if isinstance(leaf, Tensor)}
    biases = {
        name for _, leaf in leaves(tree) if isinstance(leaf, Linear) for name in leaf.bias_sources
    }
    random = np.random.default_rng(seed)

    def drawn(name: str) -> NumpyArray:
        noise = random.standard_normal(shapes[name])
        if len(shapes[name]) == 2:
            values = 0.2 * noise
        elif name in biases or name.endswith("bias"):
            values = 0.1 * noise
        else:
            values = np.sign(noise) + 0.1 * noise - offsets.get(name, 0.0)
        return values.astype(np.float32)

    return {name: drawn(name) for name in sorted(shapes)}


def write_file(path: Path, tensors: Mapping[str, NumpyArray]) -> None:
    """Write a safetensors file: eight bytes of header length, a JSON header, the data.

    Args:
        path: Of the file.
        tensors: Of the dtypes that the format has, little-endian.
    """
    codes = {dtype: code for code, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {
            "dtype": codes[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array).tobytes())
