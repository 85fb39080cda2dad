"""How long a sequence a model was made for, read from its ``config.json``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

__all__ = ["DEFAULT_CONTEXT", "context_length", "sliding_window"]

DEFAULT_CONTEXT = 2048
"""Tokens, for a model that does not say."""

_LENGTH_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_ALREADY_SCALED = ("su", "longrope", "llama3")


def context_length(config: Mapping[str, Any]) -> int:
    """The most tokens in one sequence, as vLLM derives it.

    The smallest of the lengths that the configuration names; linear and dynamic rope scaling
    multiply it, yarn multiplies its original length, llama3 and longrope name the scaled length
    already, and so does Gemma 3.
    """
    named = [config[key] for key in _LENGTH_KEYS if type(config.get(key)) is int]
    length = min(named, default=DEFAULT_CONTEXT)
    if str(config.get("model_type", "")).startswith("gemma3"):
        return length
    factor = 1.0
    for rope in _ropes(config):
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind == "longrope":
            return _original_length(config, rope, length)
        if kind in _ALREADY_SCALED:
            continue
        factor = float(rope.get("factor") or factor)
        if kind == "yarn":
            length = int(rope.get("original_max_position_embeddings") or length)
    return int(length * factor)


def _original_length(config: Mapping[str, Any], rope: Mapping[str, Any], length: int) -> int:
    """longrope: the length before scaling, where short sequences keep their quality."""
    key = "original_max_position_embeddings"
    return int(config.get(key) or rope.get(key) or length)


def _ropes(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The rope settings, one per kind of layer where they differ."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        return
    nested = [value for value in rope.values() if isinstance(value, Mapping)]
    yield from nested or [rope]


def sliding_window(config: Mapping[str, Any]) -> int | None:
    """Positions that a token can look back, in the layers that are limited; None if none is."""
    window = config.get("sliding_window")
    if type(window) is not int or window <= 0 or config.get("use_sliding_window") is False:
        return None
    return window
