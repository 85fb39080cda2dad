"""The way between the host and the devices: in few copies, and counted while somebody watches."""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from dovetail.core.contracts.workbench import Activity

__all__ = ["Meter", "Packed", "pack", "unpack"]

_COMPILED = "/jax/core/compile/backend_compile_duration"


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
    ends = np.cumsum([math.prod(shape) for shape, _ in packed.leaves])
    pieces = jnp.split(packed.words, ends[:-1])
    leaves = [
        lax.bitcast_convert_type(piece.reshape(shape), dtype)
        for piece, (shape, dtype) in zip(pieces, packed.leaves, strict=True)
    ]
    return jax.tree.unflatten(packed.tree, leaves)


class Meter(threading.local):
    """Counts programs and copies for the watchers of the same thread."""

    def __init__(self) -> None:
        self._watchers: list[Activity] = []

    @contextmanager
    def watch(self) -> Iterator[Activity]:
        """Programs that run are shapes; so is every compilation, whoever caused it."""
        self._watchers.append(Activity())
        try:
            yield self._watchers[-1]
        finally:
            self._watchers.pop()

    def compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Listens to JAX, which calls in the thread that compiles."""
        for activity in self._watchers if event == _COMPILED else ():
            activity.shapes.add(("compilation", len(activity.shapes), duration_secs))

    def counted(self, name: str, program: Callable[..., Any]) -> Callable[..., Any]:
        """The program. Arrays of numpy among its arguments are copied to the device."""

        @functools.wraps(program)
        def run(*args: Any) -> Any:
            for activity in self._watchers:
                leaves = jax.tree.leaves(args)
                activity.to_device += sum(isinstance(leaf, np.ndarray) for leaf in leaves)
                activity.shapes.add((name, *((leaf.shape, str(leaf.dtype)) for leaf in leaves)))
            return program(*args)

        return run

    def fetch(self, array: Array) -> np.ndarray[Any, Any]:
        """The array on the host; waits for it."""
        for activity in self._watchers:
            activity.to_host += 1
        return np.asarray(array)
