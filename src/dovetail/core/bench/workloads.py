"""The requests that a benchmark makes: random ones, shared prefixes, recorded conversations."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.core.errors import ConfigError
from dovetail.core.tokenizer import Tokenizer

__all__ = [
    "Lengths",
    "Sample",
    "prefix_repetition_samples",
    "random_samples",
    "sharegpt_samples",
]

_SHORTEST = 4
_LONGEST_PROMPT, _LONGEST_TOTAL = 1024, 2048


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One request to be made."""

    token_ids: list[int]
    output_len: int
    """Tokens to generate."""
    text: str | None = None
    """The prompt as text, for workloads that have it."""

    @property
    def prompt_len(self) -> int:
        """Tokens."""
        return len(self.token_ids)


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Tokens of random prompts and answers.

    Lengths are uniform between ``1 - range_ratio`` and ``1 + range_ratio`` times the mean, both
    ends included, as in vLLM's benchmarks.
    """

    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.0
    """In [0, 1); 0 makes all lengths equal."""
    prefix_len: int = 0
    """Tokens that all prompts begin with, beside ``input_len``."""

    def __post_init__(self) -> None:
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"the range ratio must be in [0, 1), not {self.range_ratio}")
        if self.input_len < 1 or self.output_len < 1 or self.prefix_len < 0:
            raise ConfigError("input and output lengths must be at least 1, the prefix at least 0")


def random_samples(
    count: int, lengths: Lengths, vocab_size: int, rng: np.random.Generator
) -> list[Sample]:
    """Prompts of random tokens: exact lengths, and nothing in common but the prefix."""
    prefix = _tokens(rng, lengths.prefix_len, vocab_size)
    inputs = _draw(rng, lengths.input_len, lengths.range_ratio, count)
    outputs = _draw(rng, lengths.output_len, lengths.range_ratio, count)
    return [
        Sample(token_ids=prefix + _tokens(rng, input_len, vocab_size), output_len=output_len)
        for input_len, output_len in zip(inputs, outputs, strict=True)
    ]


def prefix_repetition_samples(
    count: int,
    *,
    num_prefixes: int,
    prefix_len: int,
    suffix_len: int,
    output_len: int,
    vocab_size: int,
    rng: np.random.Generator,
) -> list[Sample]:
    """Prompts that share one of a few long prefixes, in random order."""
    if not 1 <= num_prefixes <= count:
        raise ConfigError(f"the number of prefixes must be from 1 to {count}, not {num_prefixes}")
    prefixes = [_tokens(rng, prefix_len, vocab_size) for _ in range(num_prefixes)]
    samples = [
        Sample(
            token_ids=prefixes[index % num_prefixes] + _tokens(rng, suffix_len, vocab_size),
            output_len=output_len,
        )
        for index in range(count)
    ]
    return [samples[i] for i in rng.permutation(count)]


def sharegpt_samples(
    file: Path,
    count: int,
    tokenizer: Tokenizer,
    rng: np.random.Generator,
    *,
    output_len: int | None = None,
    shuffle: bool = True,
) -> list[Sample]:
    """First turns of recorded conversations, filtered as vLLM's benchmarks do.

    Prompts and answers below 4 tokens, prompts above 1,024 and sums above 2,048 are left out. If
    the file holds too few, they are used again.

    Args:
        file: JSON list of objects with ``conversations``, each a list with ``value`` strings.
        count: Number of samples.
        tokenizer: Counts tokens.
        rng: Decides the order.
        output_len: Tokens of each answer; None takes the length of the recorded one.
        shuffle: Take the conversations in random order.
    """
    turns = list(_first_turns(file))
    order = rng.permutation(len(turns)) if shuffle else range(len(turns))
    samples: list[Sample] = []
    for index in order:
        if len(samples) == count:
            break
        sample = _from_turns(*turns[index], tokenizer, output_len)
        if sample is not None:
            samples.append(sample)
    if not samples:
        raise ConfigError(f"{file} holds no conversation of a usable length")
    return [samples[i % len(samples)] for i in range(count)]


def _first_turns(file: Path) -> Iterator[tuple[str, str]]:
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        for entry in content:
            turns = entry.get("conversations") or []
            if len(turns) >= 2:
                yield str(turns[0]["value"]), str(turns[1]["value"])
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file} is not in ShareGPT's format: {error!r}") from error


def _from_turns(
    prompt: str, answer: str, tokenizer: Tokenizer, output_len: int | None
) -> Sample | None:
    """A sample, if its lengths are usable."""
    token_ids = tokenizer.encode(prompt)
    wanted = output_len or len(tokenizer.encode(answer, add_special_tokens=False))
    too_short = len(token_ids) < _SHORTEST or (output_len is None and wanted < _SHORTEST)
    too_long = len(token_ids) > _LONGEST_PROMPT or len(token_ids) + wanted > _LONGEST_TOTAL
    if too_short or too_long:
        return None
    return Sample(token_ids=token_ids, output_len=wanted, text=prompt)


def _draw(rng: np.random.Generator, mean: int, ratio: float, count: int) -> list[int]:
    low, high = max(1, int(mean * (1 - ratio))), int(np.ceil(mean * (1 + ratio)))
    drawn: list[int] = rng.integers(low, high, size=count, endpoint=True).tolist()
    return drawn


def _tokens(rng: np.random.Generator, count: int, vocab_size: int) -> list[int]:
    drawn: list[int] = rng.integers(0, vocab_size, size=count).tolist()
    return drawn
