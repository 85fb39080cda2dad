"""Tensor parallelism over numpy: which part of each parameter a device holds, and of the attention.

Query, key and value heads go to devices in runs; what follows them is cut along its inputs, so that
the devices' results sum to the layer's (Shoeybi et al., 2019).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Linear, Tensor, WeightTree
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.weights import Leaf, Parts, leaves

__all__ = ["check_split", "share_of_attention", "share_of_leaf", "share_of_parts", "split_axis"]

NumpyArray = np.ndarray[Any, Any]


def check_split(tree: WeightTree, specs: Iterable[AttentionSpec], size: int) -> None:
    """Raise UnsupportedError unless ``size`` devices can share the model evenly."""
    counts = {"attention heads": set[int](), "key and value heads": set[int]()}
    for spec in specs:
        counts["attention heads"].add(spec.num_heads)
        counts["key and value heads"].add(spec.num_kv_heads)
    for _, leaf in leaves(tree):
        for what, width in _split_widths(leaf):
            counts.setdefault(what, set()).add(width)
    for what, widths in counts.items():
        for width in sorted(widths):
            if width % size:
                allowed = ", ".join(map(str, _divisors(widths for widths in counts.values())))
                raise UnsupportedError(
                    f"tensor_parallel_size={size}: the model's {width} {what} cannot be shared"
                    f" evenly; allowed for this model: {allowed}."
                )


def share_of_attention(spec: AttentionSpec, rank: int, size: int) -> AttentionSpec:
    """The layer's attention on one of ``size`` devices, which divides its heads."""
    slopes = spec.alibi_slopes
    heads = spec.num_heads // size
    return dataclasses.replace(
        spec,
        num_heads=heads,
        num_kv_heads=spec.num_kv_heads // size,
        alibi_slopes=None if slopes is None else slopes[rank * heads : (rank + 1) * heads],
    )


def share_of_leaf(leaf: Leaf, size: int) -> Leaf:
    """The declaration of what one of ``size`` devices holds of a leaf."""
    if isinstance(leaf, Linear) and leaf.split == "out":
        return dataclasses.replace(leaf, out_features=tuple(n // size for n in leaf.out_features))
    if isinstance(leaf, Linear) and leaf.split == "in":
        return dataclasses.replace(leaf, in_features=leaf.in_features // size)
    if isinstance(leaf, Tensor) and leaf.split is not None:
        shape = [n // size if i == leaf.split else n for i, n in enumerate(leaf.shape)]
        return dataclasses.replace(leaf, shape=tuple(shape))
    return leaf


def split_axis(leaf: Leaf) -> int | None:
    """The axis of the leaf's weight that is cut, of (out, in) for a Linear; None: all have all."""
    if isinstance(leaf, Linear):
        return {"out": 0, "in": 1, None: None}[leaf.split]
    return leaf.split if isinstance(leaf, Tensor) else None


def share_of_parts(leaf: Leaf, parts: Parts, rank: int, size: int) -> Parts:
    """The part of a leaf that device ``rank`` of ``size`` holds; views, but for biases of zeros.

    A Linear that is cut along its outputs gives one array for each entry of ``out_features``. One
    that is cut along its inputs has its bias on device 0 and zeros elsewhere: results are summed.
    """
    axis = split_axis(leaf)
    if axis is None or size == 1:
        return parts
    if not isinstance(leaf, Linear):
        return Parts(weights=tuple(_cut(array, axis, rank, size) for array in parts.weights))
    if leaf.split == "in":
        weights = tuple(_cut(array, 1, rank, size) for array in parts.weights)
        biases = parts.biases if rank == 0 else tuple(map(np.zeros_like, parts.biases))
        return Parts(weights=weights, biases=biases)
    return Parts(
        weights=_cut_entries(parts.weights, leaf.out_features, rank, size),
        biases=_cut_entries(parts.biases, leaf.out_features, rank, size),
    )


def _cut_entries(
    arrays: Sequence[NumpyArray], entries: Sequence[int], rank: int, size: int
) -> tuple[NumpyArray, ...]:
    """A share of the rows of each entry, be they one array each or all in one."""
    if len(arrays) == 1:
        arrays = np.split(arrays[0], [*accumulate(entries)][:-1])
    return tuple(_cut(array, 0, rank, size) for array in arrays)


def _cut(array: NumpyArray, axis: int, rank: int, size: int) -> NumpyArray:
    width = array.shape[axis] // size
    index = [slice(None)] * array.ndim
    index[axis] = slice(rank * width, (rank + 1) * width)
    return array[tuple(index)]


def _split_widths(leaf: Leaf) -> list[tuple[str, int]]:
    if isinstance(leaf, Linear) and leaf.split == "out":
        return [("output rows of a layer", width) for width in leaf.out_features]
    if isinstance(leaf, Linear) and leaf.split == "in":
        return [("input columns of a layer", leaf.in_features)]
    if isinstance(leaf, Tensor) and leaf.split is not None:
        return [(f"entries of {leaf.source}", leaf.shape[leaf.split])]
    return []


def _divisors(groups: Iterable[Iterable[int]]) -> list[int]:
    common = int(np.gcd.reduce([width for group in groups for width in group]))
    return [n for n in range(1, common + 1) if common % n == 0]
