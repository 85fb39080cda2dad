"""Many small arrays of the host as one: a step makes one copy to the device and not twenty."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["Packed", "pack", "unpack"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Packed:
    """The leaves of a tree one after another, as int32; what they were is known when compiling."""

    words: Any
    tree: Any = field(metadata={"static": True})
    leaves: tuple[tuple[tuple[int, ...], np.dtype[Any]], ...] = field(metadata={"static": True})
    """Shape and dtype of each."""


def pack(tree: Any) -> Packed:
    """Arrays of numpy, int32 or float32."""
    leaves, structure = jax.tree.flatten(tree)
    words = np.concatenate([leaf.ravel().view(np.int32) for leaf in leaves])
    return Packed(words, structure, tuple((leaf.shape, leaf.dtype) for leaf in leaves))


def unpack(packed: Packed) -> Any:
    """The tree again, inside a compiled program."""
    ends = accumulate(math.prod(shape) for shape, _ in packed.leaves)
    pieces = jnp.split(packed.words, [*ends][:-1])
    leaves = [
        lax.bitcast_convert_type(piece.reshape(shape), dtype)
        for piece, (shape, dtype) in zip(pieces, packed.leaves, strict=True)
    ]
    return jax.tree.unflatten(packed.tree, leaves)
