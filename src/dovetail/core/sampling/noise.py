"""Noise that is a function of (seed, position) alone: no state, no order, no batch.

Number ``position`` of a seed is output ``position`` of the SplitMix64 generator (Steele, Lea and
Flood, "Fast Splittable Pseudorandom Number Generators", OOPSLA 2014) that starts at the hashed
seed. The generator adds an odd constant per output and hashes the sum, so any output is reached
directly. The values are part of what users may rely on: they never change.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from dovetail.core.types import FloatArray

__all__ = ["drawn", "hashed", "mix", "uniform"]

_MASK = (1 << 64) - 1
_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_ONE = np.uint64(1)
_30, _27, _31, _40 = np.uint64(30), np.uint64(27), np.uint64(31), np.uint64(40)


def uniform(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.integer[Any]], stream: int = 0
) -> FloatArray:
    """One number per (seed, position), uniform over the multiples of 2**-24 in [0, 1).

    Args:
        seeds: (S,)
        positions: (S,) from 0.
        stream: Draws of one position that must not be related use different streams.

    Returns:
        (S,) float32.
    """
    return drawn(hashed(seeds, stream), positions)


def hashed(seeds: npt.NDArray[np.uint64], stream: int = 0) -> npt.NDArray[np.uint64]:
    """Where the generators of seeds start: the part of ``uniform`` that positions do not change."""
    state: npt.NDArray[np.uint64] = seeds + np.uint64(stream * 0xD1342543DE82EF95 & _MASK)
    mix(state)
    return state


def drawn(starts: npt.NDArray[np.uint64], positions: npt.NDArray[np.integer[Any]]) -> FloatArray:
    """``uniform`` from generators that were ``hashed`` before."""
    state = positions.astype(np.uint64)
    state += _ONE
    state *= _GAMMA
    state += starts
    mix(state)
    state >>= _40
    numbers = state.astype(np.float32)
    numbers *= np.float32(2.0**-24)
    return numbers


def mix(state: npt.NDArray[np.uint64]) -> None:
    """The finaliser of SplitMix64, in place: a bijection in which every bit reaches every other."""
    state ^= state >> _30
    state *= _FIRST
    state ^= state >> _27
    state *= _SECOND
    state ^= state >> _31
