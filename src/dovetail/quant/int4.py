"""Weights in 4 bits, a scale for every 64 inputs of an output row; activations in 8 bits.

The entry of a group that is furthest from zero becomes -8, the one value without an opposite, so
that a scale has either sign. Of normally distributed weights this leaves a fifth less squared
error than scales of ``max|w| / 7``, which never use -8.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dovetail.core.contracts.model import Linear
from dovetail.core.contracts.ops import INT4_GROUP, Ops
from dovetail.core.contracts.quant import QuantParams, QuantScheme
from dovetail.core.types import Array
from dovetail.quant.blocks import SMALLEST, Floats, for_row_blocks
from dovetail.quant.int8 import Int8

__all__ = ["Int4"]

_LEAST, _ABOVE = np.float32(-8), np.float32(15)


class Int4(QuantScheme):
    """``codes``, uint8 (out, in / 2) as ``Ops.int4_weight`` takes them, and ``scales``, float32.

    Scales are (out, in / 64). The output layer is left to ``Int8``: its errors go straight into the
    logits.
    """

    ops = ("int4_linear", "int8_linear")

    def for_layer(self, path: str, layer: Linear) -> QuantScheme:
        """``Int8`` for the output layer."""
        return Int8(self.settings) if path == "lm_head" else self

    def refuses(self, path: str, layer: Linear) -> str | None:
        """Inputs that make no whole groups."""
        if layer.in_features % INT4_GROUP:
            return f"it has {layer.in_features} inputs, no multiple of {INT4_GROUP}"
        return None

    def quantize(self, weight: np.ndarray[Any, Any]) -> QuantParams:
        """A group of zeros gets the scale 1."""
        num_rows, width = weight.shape
        codes = np.empty((num_rows, width // 2), np.uint8)
        scales = np.empty((num_rows, width // INT4_GROUP), np.float32)

        def fill(rows: slice, wide: Floats) -> None:
            groups = wide.reshape(-1, INT4_GROUP)
            steps = _furthest(groups) / _LEAST
            steps[np.abs(steps) < SMALLEST] = 1
            scales[rows] = steps.reshape(len(wide), -1)
            np.divide(groups, steps[:, None], out=groups)
            codes[rows] = _packed(np.rint(groups, out=groups)).reshape(len(wide), -1)

        for_row_blocks(weight, fill)
        return {"codes": codes, "scales": scales}

    def num_bytes(self, layer: Linear) -> int:
        """Half a byte per weight and four per group."""
        columns = layer.in_features // 2 + layer.in_features // INT4_GROUP * 4
        return sum(layer.out_features) * columns

    def bind(self, ops: Ops, params: Mapping[str, Array], bias: Array | None) -> Array:
        """As the platform packs it."""
        return ops.int4_weight(params["codes"], params["scales"], bias)

    def apply(self, ops: Ops, x: Array, bound: Array) -> Array:
        """One op, for which platforms have kernels."""
        return ops.int4_linear(x, bound)

    def reference(self, params: QuantParams) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Codes times scales."""
        halves = np.stack((params["codes"] & 15, params["codes"] >> 4), axis=-1)
        values = halves.astype(np.float32) + _LEAST
        groups = values.reshape(*params["scales"].shape, -1) * params["scales"][..., None]
        return groups.reshape(len(groups), -1)


def _furthest(groups: Floats) -> Floats:
    """Of each row the entry that is furthest from zero. Numpy is slow along a short last axis."""
    columns = np.ascontiguousarray(groups.T)
    highest, lowest = columns.max(axis=0), columns.min(axis=0)
    furthest: Floats = np.where(highest > -lowest, highest, lowest)
    return furthest


def _packed(values: Floats) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Two neighbours to a byte, the first one low, from whole numbers of -8 to 8; 8 becomes 7."""
    values -= _LEAST
    np.minimum(values, _ABOVE, out=values)
    pairs = values.astype(np.uint8).view("<u2")
    packed: np.ndarray[Any, np.dtype[np.uint8]] = (pairs | pairs >> 4).astype(np.uint8)
    return packed
