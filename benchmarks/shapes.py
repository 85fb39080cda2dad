"""Models of known shape with random weights: nothing is downloaded.

``write_config`` makes a folder that ``--load-format dummy`` serves; ``write_checkpoint`` one with
weights, for measuring how they are read.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.core.models.registry import find_model
from dovetail.core.models.weights import needs

__all__ = [
    "SHAPES",
    "checkpoint_bytes",
    "free_bytes",
    "tiny",
    "write_checkpoint",
    "write_config",
]

_QWEN3: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "dtype": "bfloat16",
    "head_dim": 128,
    "vocab_size": 151_936,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "hidden_act": "silu",
    "eos_token_id": 151_645,
}

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "qwen3-8b": {
        **_QWEN3,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "tie_word_embeddings": False,
    },
    "llama-3.1-8b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 128_256,
        "hidden_size": 4096,
        "intermediate_size": 14_336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "eos_token_id": 128_001,
    },
    "qwen0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dtype": "bfloat16",
        "vocab_size": 151_936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": 151_643,
    },
    "llama1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "eos_token_id": 128_001,
    },
}
"""The configs, by name; the last two have the sizes of Qwen2.5-0.5B and of Llama-3.2-1B, the latter
with plain rotary positions."""

_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "eos_token_id": 1,
    "max_position_embeddings": 4096,
}
_SHARD = 4 << 30
"""Bytes of a file, at most, but for a tensor that is larger."""
_BLOCK = 1 << 24
"""Random numbers that are repeated."""


def tiny(config: dict[str, Any]) -> dict[str, Any]:
    """A model of the same family that is there in a moment."""
    return config | _TINY


def write_config(folder: Path, config: dict[str, Any]) -> Path:
    """A folder with nothing but the config; returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    return folder


def checkpoint_bytes(config: dict[str, Any]) -> int:
    """Of all tensors, in two bytes each."""
    return 2 * sum(map(math.prod, _tensors(config).values()))


def free_bytes(folder: Path) -> int:
    """On the disk of a folder."""
    return shutil.disk_usage(folder).free


def write_checkpoint(folder: Path, config: dict[str, Any], limit: float = math.inf) -> Path:
    """A folder with weights: small random bf16, which will come from disk when they are read.

    Raises:
        TimeoutError: It takes longer than ``limit`` seconds.
    """
    end = time.monotonic() + limit
    write_config(folder, config)
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    size = 0
    for name, shape in _tensors(config).items():
        num_bytes = 2 * math.prod(shape)
        if shards[-1] and size + num_bytes > _SHARD:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size += num_bytes
    files = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard, end)
        files |= dict.fromkeys(shard, name)
    index = {"metadata": {"total_size": checkpoint_bytes(config)}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _tensors(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything that a checkpoint of the model holds."""
    model_class = find_model(config["architectures"])
    if model_class is None:
        raise SystemExit(f"there is no native model for {config['architectures']}")
    model = model_class.from_config(config, max_model_len=config["max_position_embeddings"])
    return needs(model.weights())


def _write_shard(path: Path, tensors: dict[str, tuple[int, ...]], latest: float) -> None:
    header, size = {}, 0
    for name, shape in tensors.items():
        start, size = size, size + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, size]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    block = memoryview(_small_numbers().view(np.uint8))
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for start in range(0, size, len(block)):
            if time.monotonic() > latest:
                raise TimeoutError(f"the disk is too slow: {path} has {start} of {size} bytes")
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _small_numbers() -> np.ndarray[Any, np.dtype[np.uint16]]:
    """bf16 around 0: the upper halves of float32."""
    numbers = np.random.default_rng(0).standard_normal(_BLOCK, np.float32) * np.float32(0.02)
    return (numbers.view(np.uint32) >> 16).astype(np.uint16)
