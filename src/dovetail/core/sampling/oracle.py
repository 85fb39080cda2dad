"""The tokens of the oracle: a hash of everything before them, so that any mix-up shows.

The hash of a prefix is the sum, modulo 2**64, of one SplitMix64 number per (token, position). A
sum is extended by a token in constant time and by many tokens at once, and differs, but for odds
of 2**-64, where a token is lost, repeated, moved or another's. The next token is drawn from the
hash and, where the request samples, from its noise, so that two completions of one prompt differ
and a wrong seed or position shows too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dovetail.core.sampling.noise import mix, uniform
from dovetail.core.types import FloatArray, IntArray

__all__ = ["Answer", "HashArray", "TokenRule", "parts"]

HashArray = npt.NDArray[np.uint64]

_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_POSITION = 0xD1342543DE82EF95
_NOISE = 0x2545F4914F6CDD1D
_NOISE_SCALE = 1 << 24


def parts(tokens: npt.NDArray[np.integer[Any]], positions: npt.NDArray[Any]) -> HashArray:
    """What each token at its position adds to the hash of a prefix. All arrays are (N,)."""
    state = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(_GAMMA)
    mix(state)
    state += (positions.astype(np.uint64) + np.uint64(1)) * np.uint64(_POSITION)
    mix(state)
    return state


@dataclass(frozen=True)
class TokenRule:
    """How a hash becomes a token."""

    vocab_size: int
    end_token: int | None = None
    end_rate: float = 0.0
    """How often the token is ``end_token``, beside its share of the vocabulary."""

    def choose(self, hashes: HashArray, noise: FloatArray) -> IntArray:
        """The tokens that follow prefixes with these hashes. Arrays are (N,).

        Args:
            hashes: Sums of ``parts``.
            noise: In [0, 1), a multiple of 2**-24; 0 where the row is greedy.
        """
        state = hashes + (noise * np.float32(_NOISE_SCALE)).astype(np.uint64) * np.uint64(_NOISE)
        mix(state)
        tokens = (state % np.uint64(self.vocab_size)).astype(np.int32)
        if self.end_token is not None and self.end_rate:
            state *= np.uint64(_GAMMA)
            mix(state)
            ends = (state >> np.uint64(40)) < np.uint64(self.end_rate * _NOISE_SCALE)
            tokens[ends] = self.end_token
        return tokens


class Answer:
    """What a request must be given, worked out one token after another without an engine.

    Args:
        rule: The oracle's.
        prompt: The request's.
        seed: Of a request that samples; None if it is greedy.
        most: No more tokens than this are asked for.
        allow: The tokens that may follow those so far, ascending; None: all of them, always.
    """

    def __init__(
        self,
        rule: TokenRule,
        prompt: Sequence[int],
        *,
        seed: int | None = None,
        most: int = 0,
        allow: Callable[[list[int]], list[int]] | None = None,
    ) -> None:
        self._rule = rule
        self._allow = allow
        self._length = len(prompt)
        self._sum = sum(_part(token, position) for position, token in enumerate(prompt)) & _MASK
        self._noise = [0] * most
        if seed is not None:
            positions = np.arange(len(prompt), len(prompt) + most)
            drawn = uniform(np.full(most, seed % (1 << 64), np.uint64), positions)
            self._noise = (drawn * _NOISE_SCALE).astype(np.int64).tolist()
        self.token_ids: list[int] = []
        """Those so far."""

    def at(self, index: int) -> int:
        """The token with this index, from 0; below ``most``."""
        while len(self.token_ids) <= index:
            token = self._next(self._noise[len(self.token_ids)])
            if self._allow is not None:
                allowed = self._allow(self.token_ids)
                token = token if token in allowed else allowed[self._sum % len(allowed)]
            self._sum = (self._sum + _part(token, self._length)) & _MASK
            self._length += 1
            self.token_ids.append(token)
        return self.token_ids[index]

    def _next(self, noise: int) -> int:
        rule = self._rule
        state = _mixed((self._sum + noise * _NOISE) & _MASK)
        if rule.end_token is not None and rule.end_rate:
            second = _mixed(state * _GAMMA & _MASK) >> 40
            if second < int(rule.end_rate * _NOISE_SCALE):
                return rule.end_token
        return state % rule.vocab_size


def _part(token: int, position: int) -> int:
    state = _mixed((token + 1) * _GAMMA & _MASK)
    return _mixed((state + (position + 1) * _POSITION) & _MASK)


def _mixed(state: int) -> int:
    """As ``mix``, for a plain integer."""
    state ^= state >> 30
    state = state * 0xBF58476D1CE4E5B9 & _MASK
    state ^= state >> 27
    state = state * 0x94D049BB133111EB & _MASK
    return state ^ state >> 31
