"""What the platforms without a model share: their options, and log-probabilities made up."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dovetail.core.batch import LogprobArrays
from dovetail.core.contracts.runner import CacheSpec, RunnerPlan
from dovetail.core.errors import CheckpointError, ConfigError, OutOfMemoryError
from dovetail.core.types import IntArray

__all__ = [
    "cache_plan",
    "check_fit",
    "end_tokens",
    "flat_logprobs",
    "number_option",
    "positive_option",
    "vocabulary",
]


def vocabulary(hf_config: dict[str, Any]) -> int:
    """The vocabulary size. Raises CheckpointError if the model's config has none."""
    size = hf_config.get("vocab_size")
    if type(size) is not int or size < 1:
        raise CheckpointError(
            f"config.json must give vocab_size as a positive integer, not {size!r:.80}."
        )
    return size


def end_tokens(hf_config: dict[str, Any]) -> list[int]:
    """The model's end-of-text tokens, as its config has them."""
    ends = hf_config.get("eos_token_id")
    return [token for token in (ends if isinstance(ends, list) else [ends]) if type(token) is int]


def positive_option(options: dict[str, Any], name: str, default: int) -> int:
    """An option that counts something. Raises ConfigError."""
    value = options.get(name, default)
    if type(value) is not int or value < 1:
        raise ConfigError(f"The option {name} must be a positive integer, not {value!r:.80}.")
    return value


def number_option(options: dict[str, Any], name: str, default: float, most: float) -> float:
    """An option from 0 to ``most``. Raises ConfigError."""
    value = options.get(name, default)
    if type(value) not in (int, float) or not 0 <= value <= most:
        raise ConfigError(
            f"The option {name} must be a number from 0 to {most:g}, not {value!r:.80}."
        )
    return float(value)


def cache_plan(cache: CacheSpec, choices: Mapping[str, str]) -> RunnerPlan:
    """The plan of a runner that has no weights."""
    return RunnerPlan(
        weight_bytes=0,
        step_bytes=0,
        bytes_per_block=cache.bytes_per_block,
        window=cache.window,
        choices=choices,
    )


def check_fit(num_blocks: int, cache: CacheSpec) -> None:
    """Raises OutOfMemoryError where a device of this size would."""
    needed = num_blocks * cache.bytes_per_block
    if needed > cache.bytes_available:
        raise OutOfMemoryError(
            f"{num_blocks} KV blocks need {needed} bytes;"
            f" {cache.bytes_available} are free (option memory)."
        )


def flat_logprobs(chosen: IntArray, num_logprobs: int, vocab_size: int) -> LogprobArrays:
    """As if every token were equally likely; all ranks are then 1. ``chosen`` is (N,)."""
    shape = (len(chosen), 1 + num_logprobs)
    token_ids = np.empty(shape, np.int32)
    token_ids[:, 0] = chosen
    token_ids[:, 1:] = np.arange(num_logprobs) % vocab_size
    return LogprobArrays(
        token_ids=token_ids,
        logprobs=np.full(shape, -np.log(vocab_size), np.float32),
        ranks=np.ones(len(chosen), np.int32),
    )
