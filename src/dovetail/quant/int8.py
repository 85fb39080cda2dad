"""Weights in 8 bits, symmetric, one scale per output row; activations in 8 bits as they come.

``W[o, i]`` becomes ``round(W[o, i] / scale[o])`` with ``scale[o] = max |W[o]| / 127``: round to
nearest, as in Dettmers et al., "LLM.int8()" (2022), section 2, without the outlier columns: every
token has a step of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dovetail.core.contracts.model import Linear
from dovetail.core.contracts.ops import Ops
from dovetail.core.contracts.quant import QuantParams, QuantScheme
from dovetail.core.types import Array
from dovetail.quant.blocks import SMALLEST, Floats, for_row_blocks

__all__ = ["Int8"]

_LARGEST = np.float32(127)


class Int8(QuantScheme):
    """``codes``, int8 (out, in), and ``scales``, float32 (out,)."""

    ops = ("int8_linear",)

    def quantize(self, weight: np.ndarray[Any, Any]) -> QuantParams:
        """A row of zeros gets the scale 1."""
        codes = np.empty(weight.shape, np.int8)
        scales = np.empty(len(weight), np.float32)

        def fill(rows: slice, wide: Floats) -> None:
            steps = np.abs(wide).max(axis=1) / _LARGEST
            steps[steps < SMALLEST] = 1
            scales[rows] = steps
            np.divide(wide, steps[:, None], out=wide)
            codes[rows] = np.rint(wide, out=wide)

        for_row_blocks(weight, fill)
        return {"codes": codes, "scales": scales}

    def num_bytes(self, layer: Linear) -> int:
        """A byte per weight and four per row."""
        return sum(layer.out_features) * (layer.in_features + 4)

    def bind(self, ops: Ops, params: Mapping[str, Array], bias: Array | None) -> Array:
        """As the platform packs it."""
        return ops.int8_weight(params["codes"], params["scales"], bias)

    def apply(self, ops: Ops, x: Array, bound: Array) -> Array:
        """One op, for which platforms have kernels."""
        return ops.int8_linear(x, bound)

    def reference(self, params: QuantParams) -> np.ndarray[Any, np.dtype[np.float32]]:
        """Codes times scales."""
        return np.asarray(params["codes"] * params["scales"][:, None], np.float32)
