"""What a model folder says about its model. Reads JSON and headers, loads no framework."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dovetail.core.config.context import context_length, sliding_window
from dovetail.core.config.locate import locate
from dovetail.core.config.schema import EngineConfig
from dovetail.core.demo import DEMO_MODEL_NAME
from dovetail.core.errors import CheckpointError, RequestError
from dovetail.core.request import SamplingParams

__all__ = ["ModelFacts", "read_facts"]

_TENSOR_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_LARGEST_HEADER = 100 << 20
_OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5")
_PARAMS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """A checkpoint, as its own files describe it."""

    name: str
    """The model as the user named it."""
    path: Path
    tokenizer_path: Path
    hf_config: dict[str, Any]
    """``config.json``, with the entries of ``text_config`` put in place."""
    architectures: tuple[str, ...]
    """Names of the model's class, preferred first."""
    dtype: str | None
    """The dtype of the weights; None if the checkpoint does not say."""
    vocab_size: int
    """Width of the logits."""
    max_model_len: int
    """The most tokens in one sequence."""
    sliding_window: int | None
    """Positions that a token can look back, in layers that limit it."""
    quantization: str | None
    """Quantization of the stored weights."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end an answer, from config.json and generation_config.json."""
    default_params: SamplingParams
    """What a request uses where it says nothing."""
    has_weights: bool
    """There are safetensors files."""


def read_facts(config: EngineConfig, *, environ: Mapping[str, str] = os.environ) -> ModelFacts:
    """Find the model that ``config`` names, downloading it if need be, and read its facts.

    Raises:
        CheckpointError: There is no such model, or a file of it is broken; names the file.
    """
    path = locate(config.model, environ=environ)
    tokenizer = path
    if config.tokenizer is not None:
        tokenizer = locate(config.tokenizer, tokenizer_only=True, environ=environ)
    hf_config = _flatten(_read_json(path / "config.json"))
    generation = _generation_config(path, config.generation_config)
    ignored = config.generation_config == "dovetail"
    return ModelFacts(
        name=config.model or DEMO_MODEL_NAME,
        path=path,
        tokenizer_path=tokenizer,
        hf_config=hf_config,
        architectures=_architectures(path, hf_config),
        dtype=_dtype(path, hf_config),
        vocab_size=_vocab_size(path, hf_config),
        max_model_len=context_length(hf_config),
        sliding_window=sliding_window(hf_config),
        quantization=_quantization(hf_config),
        eos_token_ids=_eos_token_ids(path, hf_config, generation),
        default_params=SamplingParams() if ignored else _default_params(path, generation),
        has_weights=next(path.glob("*.safetensors"), None) is not None,
    )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object")
    return content


def _flatten(config: dict[str, Any]) -> dict[str, Any]:
    """The text model's part of the configuration, over what is said for all parts."""
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    flat = {k: v for k, v in config.items() if k != "text_config"}
    flat |= {k: v for k, v in text.items() if v is not None or k not in flat}
    if config.get("architectures"):
        flat["architectures"] = config["architectures"]
    return flat


def _architectures(path: Path, config: dict[str, Any]) -> tuple[str, ...]:
    names = config.get("architectures")
    if not isinstance(names, list) or not names or not all(isinstance(n, str) for n in names):
        raise CheckpointError(f"{path / 'config.json'} names no architectures")
    return tuple(names)


def _vocab_size(path: Path, config: dict[str, Any]) -> int:
    size = config.get("vocab_size")
    if type(size) is not int or size < 1:
        raise CheckpointError(f"{path / 'config.json'} has no usable vocab_size: {size!r}")
    return size


def _dtype(path: Path, config: dict[str, Any]) -> str | None:
    named = config.get("dtype") or config.get("torch_dtype")
    if isinstance(named, str):
        return named.removeprefix("torch.")
    return _stored_dtype(path)


def _stored_dtype(path: Path) -> str | None:
    """The commonest floating-point dtype in the header of the first weights file."""
    file = min(path.glob("*.safetensors"), default=None)
    if file is None:
        return None
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if size > _LARGEST_HEADER:
            raise CheckpointError(f"{file} is not a safetensors file")
        try:
            header = json.loads(stream.read(size))
        except ValueError as error:
            raise CheckpointError(f"{file} has a broken header: {error}") from error
    entries = [entry for name, entry in header.items() if name != "__metadata__"]
    found = Counter(_TENSOR_DTYPES.get(entry.get("dtype")) for entry in entries)
    found.pop(None, None)
    return max(found, key=lambda dtype: found[dtype]) if found else None


def _quantization(config: dict[str, Any]) -> str | None:
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    return method if isinstance(method, str) else None


def _generation_config(path: Path, choice: str) -> dict[str, Any]:
    """The generation settings; empty if the folder has none. ``choice`` may be a folder."""
    if choice not in ("auto", "dovetail"):
        return _read_json(Path(choice).expanduser() / "generation_config.json")
    file = path / "generation_config.json"
    return _read_json(file) if file.is_file() else {}


def _eos_token_ids(path: Path, *configs: dict[str, Any]) -> tuple[int, ...]:
    merged: dict[int, None] = {}
    for config in configs:
        ids = config.get("eos_token_id")
        for token in ids if isinstance(ids, list) else [ids]:
            if token is None:
                continue
            if type(token) is not int or token < 0:
                raise CheckpointError(f"{path}: eos_token_id must be token ids, not {ids!r:.80}")
            merged[token] = None
    return tuple(merged)


def _default_params(path: Path, generation: dict[str, Any]) -> SamplingParams:
    given = {ours: generation.get(theirs) for theirs, ours in _PARAMS.items()}
    try:
        return SamplingParams(**{k: v for k, v in given.items() if v is not None})
    except RequestError as error:
        raise CheckpointError(f"{path / 'generation_config.json'}: {error}") from error


def weights_hint(path: Path) -> str:
    """What a folder holds in place of safetensors files, to end a message with."""
    other = [file.name for pattern in _OTHER_WEIGHTS for file in sorted(path.glob(pattern))]
    return f"; it holds {other[0]}, a format that this version does not read" if other else ""
