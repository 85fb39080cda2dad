"""Puts parameters on the devices: each its own share, cut from the checkpoint on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail.core.contracts.model import Constant, Linear
from dovetail.core.models.split import share_of_parts, split_axis
from dovetail.core.models.weights import Leaf, Parts
from dovetail_tpu.ops import DenseLinear

__all__ = ["AXIS", "Binder", "partition"]

AXIS = "tp"
"""The axis of the mesh: the devices that share every layer."""

_HostArray = np.ndarray[Any, Any]


def partition(axis: int | None) -> PartitionSpec:
    """An array that is cut along an axis; None: every device has all of it."""
    parts = () if axis is None else (*[None] * axis, AXIS)
    return PartitionSpec(*parts)  # type: ignore[no-untyped-call]


class Binder:
    """From a leaf and its arrays to what the model is given. Remembers tables that layers share."""

    def __init__(self, mesh: Mesh, dtype: str) -> None:
        self._mesh = mesh
        self._dtype = jnp.dtype(dtype)
        self._tables: dict[str, Array] = {}

    def __call__(self, leaf: Leaf, parts: Parts) -> Any:
        """A ``DenseLinear`` for a Linear, else an array."""
        if isinstance(leaf, Constant):
            return self._put(None, lambda rank: parts.weights[0])
        shares = [
            share_of_parts(leaf, parts, rank, self._mesh.size) for rank in range(self._mesh.size)
        ]
        axis = split_axis(leaf)
        if not isinstance(leaf, Linear):
            # A weight with an offset keeps the precision that the sum has.
            dtype = jnp.dtype(jnp.float32) if leaf.offset else self._dtype
            table = self._put(axis, lambda rank: _joined(shares[rank].weights, dtype))
            self._tables[leaf.source] = table
            return table
        if leaf.tied_to is not None and leaf.sources[0] in self._tables:
            return DenseLinear(self._tables[leaf.sources[0]])
        weight = self._put(axis, lambda rank: _joined(shares[rank].weights, self._dtype))
        if not parts.biases:
            return DenseLinear(weight)
        # Of a layer whose inputs are cut, every device has a bias of its own: its share of the sum.
        bias_axis = None if axis is None else 0
        bias = self._put(bias_axis, lambda rank: _joined(shares[rank].biases, self._dtype))
        return DenseLinear(weight, bias)

    def _put(self, axis: int | None, share: Callable[[int], _HostArray]) -> Array:
        """One array over all devices, made of each one's share."""
        sharding = NamedSharding(self._mesh, partition(axis))
        if axis is None:
            whole: Array = jax.device_put(share(0), sharding)
            return whole
        pieces = [jax.device_put(share(i), d) for i, d in enumerate(self._mesh.devices)]
        shape = list(pieces[0].shape)
        shape[axis] *= len(pieces)
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, pieces)


def _joined(arrays: Sequence[_HostArray], dtype: np.dtype[Any]) -> _HostArray:
    """The arrays one below the other; a view if there is one, of the right dtype."""
    cast = [array.astype(dtype, copy=False) for array in arrays]
    return cast[0] if len(cast) == 1 else np.concatenate(cast)
