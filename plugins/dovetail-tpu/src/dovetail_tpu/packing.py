"""Many small arrays of the host as one: a step makes one copy to the device and not twenty."""

from __future__ import annotations

from dataclasses import dataclass, field
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
    leaves: tuple[tuple[tuple[int, ...], str], ...] = field(metadata={"static": True})
    """Shape and dtype of each."""


def pack(tree: Any) -> Packed:
    """Arrays of numpy: int32 and float32 as they are, others that int32 can hold, such as bool."""
    leaves, structure = jax.tree.flatten(tree)
    words = [
        leaf.view(np.int32) if leaf.dtype == np.float32 else leaf.astype(np.int32, copy=False)
        for leaf in leaves
    ]
    flat = np.concatenate([word.ravel() for word in words])
    return Packed(flat, structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves))


def unpack(packed: Packed) -> Any:
    """The tree again, inside a compiled program."""
    leaves, start = [], 0
    for shape, dtype in packed.leaves:
        end = start + int(np.prod(shape))
        words = packed.words[start:end].reshape(shape)
        if dtype == "float32":
            leaves.append(lax.bitcast_convert_type(words, jnp.float32))
        else:
            leaves.append(words.astype(dtype))
        start = end
    return jax.tree.unflatten(packed.tree, leaves)
