"""Workloads that have names, so that figures of different engines can be laid side by side."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dovetail.core.bench.workloads import Lengths, Sample, random_samples

__all__ = ["FixedLengths", "NamedWorkload", "UniformLengths", "WORKLOADS"]


class _Draw(Protocol):
    """How the requests of a workload are drawn."""

    def samples(self, count: int, vocab_size: int, seed: int) -> list[Sample]: ...


@dataclass(frozen=True, kw_only=True)
class FixedLengths:
    """All prompts and all answers of one length, prompts of random tokens."""

    input_len: int
    output_len: int

    def samples(self, count: int, vocab_size: int, seed: int) -> list[Sample]:
        """The same for the same seed."""
        lengths = Lengths(input_len=self.input_len, output_len=self.output_len)
        return random_samples(count, lengths, vocab_size, np.random.default_rng(seed))


@dataclass(frozen=True, kw_only=True)
class UniformLengths:
    """Lengths between two bounds, both included.

    Drawn with Python's own generator, in the order of the benchmark of nano-vllm: each prompt's
    length and then its tokens, and after all prompts the lengths of the answers. So the requests
    are the same ones, but where the vocabulary has no token of that number.
    """

    shortest: int
    longest: int
    largest_token: int

    def samples(self, count: int, vocab_size: int, seed: int) -> list[Sample]:
        """The same for the same seed."""
        rng = random.Random(seed)
        prompts = [self._prompt(rng, vocab_size) for _ in range(count)]
        return [Sample(token_ids=prompt, output_len=self._length(rng)) for prompt in prompts]

    def _prompt(self, rng: random.Random, vocab_size: int) -> list[int]:
        length = self._length(rng)
        return [rng.randint(0, self.largest_token) % vocab_size for _ in range(length)]

    def _length(self, rng: random.Random) -> int:
        return rng.randint(self.shortest, self.longest)


@dataclass(frozen=True, kw_only=True)
class NamedWorkload:
    """A workload and what its name stands for beside the lengths."""

    summary: str
    draw: _Draw
    num_prompts: int = 256
    """Requests, unless the user says otherwise."""
    temperature: float = 1.0


def _fixed(input_len: int, output_len: int) -> NamedWorkload:
    return NamedWorkload(
        summary=f"{input_len} tokens in, {output_len} out",
        draw=FixedLengths(input_len=input_len, output_len=output_len),
    )


WORKLOADS: Mapping[str, NamedWorkload] = {
    "nano": NamedWorkload(
        summary="100 to 1024 tokens in and out, at temperature 0.6, as nano-vllm draws them",
        draw=UniformLengths(shortest=100, longest=1024, largest_token=10_000),
        temperature=0.6,
    ),
    "1000/1000": _fixed(1000, 1000),
    "128/2048": _fixed(128, 2048),
    "2048/128": _fixed(2048, 128),
    "1024/1024": _fixed(1024, 1024),
}
"""By name."""
