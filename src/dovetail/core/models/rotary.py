"""Rotary position tables for every kind of scaling that checkpoints use (Su et al., 2021).

Frequencies are rounded to float32 where transformers rounds them: at position p a frequency that
differs in its last bit turns by p times that much, which shows in the logits at long contexts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from dovetail.core.contracts.model import Constant, WeightTree
from dovetail.core.contracts.ops import Ops
from dovetail.core.errors import CheckpointError, UnsupportedError
from dovetail.core.models.settings import Settings
from dovetail.core.types import Array, FloatArray

__all__ = ["ROPE_TYPES", "Rotary"]


@dataclass(frozen=True, kw_only=True)
class Rotary:
    """Cosines and sines of the positions of one model."""

    frequencies: FloatArray
    """Radians per position: (F,), or (L, F) where they depend on the position."""
    attention_factor: float
    """Multiplies the cosines and sines (YaRN and LongRoPE)."""
    max_model_len: int
    """L, the positions of the tables."""

    @classmethod
    def from_config(cls, settings: Settings, *, head_size: int, max_model_len: int) -> Rotary:
        """Read ``rope_parameters`` (transformers 5) or ``rope_theta`` and ``rope_scaling``.

        Raises:
            UnsupportedError: A rope type that is not in ``ROPE_TYPES``.
            CheckpointError: A parameter of the type is absent or wrong.
        """
        rope = _Rope.read(settings, head_size=head_size, max_model_len=max_model_len)
        kind = rope.kind
        if kind not in _KINDS:
            raise UnsupportedError(
                f"{settings.owner}: the rope type {kind!r} is not supported by the native model; "
                f"known: {', '.join(ROPE_TYPES)}."
            )
        frequencies, factor = _KINDS[kind](rope)
        return cls(frequencies=frequencies, attention_factor=factor, max_model_len=max_model_len)

    def cos(self) -> FloatArray:
        """(L, F) float32."""
        return self._table(np.cos)

    def sin(self) -> FloatArray:
        """(L, F) float32."""
        return self._table(np.sin)

    def weights(self) -> WeightTree:
        """Both tables, to be made when they are bound."""
        return {"cos": Constant(make=self.cos), "sin": Constant(make=self.sin)}

    @staticmethod
    def look_up(ops: Ops, tables: Mapping[str, Any], positions_T: Array) -> tuple[Array, Array]:
        """Cosines and sines of a step's positions, (T, F) each."""
        return (
            ops.embedding(positions_T, tables["cos"]),
            ops.embedding(positions_T, tables["sin"]),
        )

    def _table(self, function: Callable[[FloatArray], FloatArray]) -> FloatArray:
        positions = np.arange(self.max_model_len, dtype=np.float32)[:, None]
        return function(positions * self.frequencies) * np.float32(self.attention_factor)


@dataclass(frozen=True, kw_only=True)
class _Rope:
    """The parameters of one config, in one form."""

    kind: str
    parameters: Settings
    base: float
    dim: int
    """Entries of a head that turn; F is half of it."""
    max_positions: int
    original_positions: int
    """Context of the pretraining, before it was extended."""
    max_model_len: int

    @classmethod
    def read(cls, top: Settings, *, head_size: int, max_model_len: int) -> _Rope:
        given = top.values.get("rope_scaling") or top.values.get("rope_parameters") or {}
        if not isinstance(given, Mapping):
            raise CheckpointError(f"config.json has rope parameters {given!r:.80}, not an object.")
        if any(isinstance(value, Mapping) for value in given.values()):
            raise UnsupportedError(
                f"{top.owner}: rope parameters per layer type are not supported."
            )
        rope = Settings(given, f"{top.owner} (rope parameters)")
        max_positions = top.integer("max_position_embeddings", minimum=2)
        known = rope.integer("original_max_position_embeddings", max_positions, minimum=2)
        partial = rope.number(
            "partial_rotary_factor", top.optional_number("partial_rotary_factor") or 1.0
        )
        dim = int(head_size * partial)
        if dim < 2 or dim % 2 or dim > head_size:
            raise CheckpointError(
                f"{top.owner}: {dim} entries of a head of {head_size} would turn "
                f"(partial_rotary_factor {partial}); allowed: an even number from 2."
            )
        return cls(
            kind=_kind(given),
            parameters=rope,
            base=rope.number("rope_theta", top.optional_number("rope_theta") or 10000.0),
            dim=dim,
            max_positions=max_positions,
            original_positions=top.integer("original_max_position_embeddings", known, minimum=2),
            max_model_len=max_model_len,
        )

    def wavelengths(self) -> FloatArray:
        """Positions per radian, (F,): powers of the base."""
        return _powers(self.base, self.dim)


def _kind(given: Mapping[str, Any]) -> str:
    kind = str(given.get("rope_type") or given.get("type") or "default")
    # LongRoPE went by two other names in the first Phi-3 checkpoints.
    return "longrope" if kind == "su" or (kind == "yarn" and "long_factor" in given) else kind


def _powers(base: Any, dim: int) -> FloatArray:
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    powers: FloatArray = np.power(base, exponents.astype(np.float64)).astype(np.float32)
    return powers


_ONE = np.float32(1)


def _default(rope: _Rope) -> tuple[FloatArray, float]:
    return _ONE / rope.wavelengths(), 1.0


def _linear(rope: _Rope) -> tuple[FloatArray, float]:
    """Position interpolation (Chen et al., 2023)."""
    return _ONE / rope.wavelengths() / np.float32(rope.parameters.number("factor")), 1.0


def _dynamic(rope: _Rope) -> tuple[FloatArray, float]:
    """NTK-aware scaling that grows with the length (bloc97 and emozilla, 2023).

    Position p beyond the original context turns as in a sequence of length p + 1. Being a function
    of the position alone, a cached key stays valid however long its sequence becomes; decoding one
    token at a time gives the same in transformers.
    """
    if rope.dim < 4:
        raise CheckpointError("Dynamic rope scaling needs at least 4 entries of a head that turn.")
    factor = rope.parameters.number("factor")
    lengths = np.arange(1, rope.max_model_len + 1, dtype=np.float64)
    stretch = factor * np.maximum(lengths, rope.max_positions) / rope.max_positions - (factor - 1)
    bases = rope.base * stretch ** (rope.dim / (rope.dim - 2))
    return _ONE / _powers(bases[:, None], rope.dim), 1.0


def _yarn(rope: _Rope) -> tuple[FloatArray, float]:
    """YaRN: high frequencies stay, low ones are interpolated (Peng et al., 2023)."""
    parameters = rope.parameters
    factor = parameters.number("factor", rope.max_positions / rope.original_positions)

    def dimension(rotations: float) -> float:
        """The entry that turns this many times within the original context."""
        turns = rope.original_positions / (rotations * 2 * math.pi)
        return rope.dim * math.log(turns) / (2 * math.log(rope.base))

    low = dimension(parameters.number("beta_fast", 32.0))
    high = dimension(parameters.number("beta_slow", 1.0))
    if parameters.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dim - 1)
    high = high + 0.001 if low == high else high
    ramp = (np.arange(rope.dim // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = _ONE - np.clip(ramp, 0, 1)
    waves = rope.wavelengths()
    frequencies = _ONE / (np.float32(factor) * waves) * (_ONE - kept) + _ONE / waves * kept
    return frequencies, _yarn_attention(parameters, factor)


def _yarn_attention(parameters: Settings, factor: float) -> float:
    if parameters.has("attention_factor"):
        return parameters.number("attention_factor")

    def scaled(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if parameters.values.get("mscale") and parameters.values.get("mscale_all_dim"):
        return scaled(parameters.number("mscale")) / scaled(parameters.number("mscale_all_dim"))
    return scaled(1.0)


def _longrope(rope: _Rope) -> tuple[FloatArray, float]:
    """LongRoPE (Ding et al., 2024): one factor per frequency, for short and for long contexts.

    The long factors serve every sequence if ``max_model_len`` goes beyond the original context,
    else the short ones: a choice per sequence would make cached keys wrong once it grows.
    """
    parameters, original = rope.parameters, rope.original_positions
    long = rope.max_model_len > original
    factors = parameters.numbers("long_factor" if long else "short_factor", rope.dim // 2)
    frequencies = _ONE / (np.asarray(factors, np.float32) * rope.wavelengths())
    if parameters.has("attention_factor"):
        return frequencies, parameters.number("attention_factor")
    factor = parameters.number("factor", rope.max_positions / original)
    grown = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return frequencies, grown


def _llama3(rope: _Rope) -> tuple[FloatArray, float]:
    """Llama 3.1: low frequencies are divided, high ones stay, those between are mixed."""
    parameters, original = rope.parameters, rope.original_positions
    factor = np.float32(parameters.number("factor"))
    low, high = parameters.number("low_freq_factor"), parameters.number("high_freq_factor")
    if high <= low:
        raise CheckpointError(
            f"config.json has low_freq_factor = {low} and high_freq_factor = {high}; "
            "the second must be greater."
        )
    plain = _ONE / rope.wavelengths()
    lengths = np.float32(2 * math.pi) / plain
    mix = (np.float32(original) / lengths - np.float32(low)) / np.float32(high - low)
    mixed = (_ONE - mix) * plain / factor + mix * plain
    is_low, is_high = lengths > original / low, lengths < original / high
    return np.where(is_low, plain / factor, np.where(is_high, plain, mixed)), 1.0


_KINDS: dict[str, Callable[[_Rope], tuple[FloatArray, float]]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "yarn": _yarn,
    "longrope": _longrope,
    "llama3": _llama3,
}
ROPE_TYPES: tuple[str, ...] = (*_KINDS, "su")
"""Rope types that checkpoints may name."""
