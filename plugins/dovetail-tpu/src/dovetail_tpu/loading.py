"""Puts parameters on the devices: each its own share, cut from the checkpoint on the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from dovetail.core.contracts.model import Linear, Tensor
from dovetail.core.models.load import Unread
from dovetail.core.models.split import share_of_parts, split_axis
from dovetail.core.models.weights import Leaf
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

    def __call__(self, path: str, leaf: Leaf, unread: Unread) -> Any:
        """A ``DenseLinear`` for a Linear, else an array."""
        parts, size, axis = unread.read(), self._mesh.size, split_axis(leaf)
        shares = [share_of_parts(leaf, parts, rank, size) for rank in range(size)]
        weights = [share.weights for share in shares]
        if isinstance(leaf, Linear):
            table = self._tables.get(leaf.sources[0]) if leaf.tied_to else None
            weight = self._put(axis, weights, self._dtype) if table is None else table
            # If inputs are cut, every device has a bias of its own: its share of the sum.
            bias_axis = None if axis is None else 0
            biases = [share.biases for share in shares]
            bias = self._put(bias_axis, biases, self._dtype) if parts.biases else None
            return DenseLinear(weight, bias)
        if not isinstance(leaf, Tensor):
            return self._put(axis, weights, weights[0][0].dtype)
        # A weight with an offset keeps the precision that the sum has.
        dtype = jnp.dtype(jnp.float32) if leaf.offset else self._dtype
        return self._tables.setdefault(leaf.source, self._put(axis, weights, dtype))

    def _put(
        self, axis: int | None, shares: Sequence[Sequence[_HostArray]], dtype: np.dtype[Any]
    ) -> Array:
        """One array over all devices, made of each one's share, cut along the axis."""
        pieces = [
            jax.device_put(_joined(share, dtype), device)
            for share, device in zip(shares, self._mesh.devices, strict=True)
        ]
        shape = [n * len(pieces) if i == axis else n for i, n in enumerate(pieces[0].shape)]
        sharding = NamedSharding(self._mesh, partition(axis))
        return jax.make_array_from_single_device_arrays(tuple(shape), sharding, pieces)


def _joined(arrays: Sequence[_HostArray], dtype: np.dtype[Any]) -> _HostArray:
    """The arrays one below the other; a view if there is one, of the right dtype."""
    cast = [array.astype(dtype, copy=False) for array in arrays]
    return cast[0] if len(cast) == 1 else np.concatenate(cast)
