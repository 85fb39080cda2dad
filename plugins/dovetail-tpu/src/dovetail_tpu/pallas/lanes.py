"""How the key and value of a position lie in lanes, the last axis of a tile of memory."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp

__all__ = ["Lanes"]

_LANES = 128


@dataclass(frozen=True)
class Lanes:
    """Heads of ``size`` entries. A key and a value share 128 lanes if they fit, else have own ones.

    Memory comes in whole lanes: filling them takes nothing that was not lost; sharing halves it.
    """

    size: int

    @property
    def shared(self) -> bool:
        """Key and value lie in the same 128 lanes."""
        return 2 * self.size <= _LANES

    @property
    def part(self) -> int:
        """Lanes of a query, and of weighted values."""
        return -(-self.size // _LANES) * _LANES

    @property
    def width(self) -> int:
        """W, the lanes of a key and its value."""
        return self.part if self.shared else 2 * self.part

    def query(self, q: jax.Array) -> jax.Array:
        """(..., E) to (..., part): zeros meet what is not of the key."""
        return _filled(q, self.part)

    def join(self, k: jax.Array, v: jax.Array) -> jax.Array:
        """(..., E) twice to (..., W)."""
        half = self.size if self.shared else self.part
        return _filled(jnp.concatenate([_filled(k, half), v], -1), self.width)

    def keys(self, entries: jax.Array) -> jax.Array:
        """(..., W) to (..., part)."""
        return entries[..., : self.part]

    def values(self, entries: jax.Array) -> jax.Array:
        """(..., W) to (..., part)."""
        return entries[..., -self.part :]

    def result(self, out: jax.Array) -> jax.Array:
        """(..., part) to (..., E)."""
        start = self.size if self.shared else 0
        return out[..., start : start + self.size]


def _filled(x: jax.Array, width: int) -> jax.Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, width - x.shape[-1])])
