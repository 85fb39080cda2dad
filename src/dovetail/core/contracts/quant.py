"""The quantization contract: a format says how bytes lie, a scheme owns a layer's parameters.

Offered through the entry-point group ``dovetail.quant``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from dovetail.core.contracts.model import Linear
from dovetail.core.contracts.ops import Ops
from dovetail.core.types import Array

__all__ = ["QuantScheme"]


class QuantScheme(Protocol):
    """How the linear layers of one model are stored and applied."""

    name: str

    def sources(self, layer: Linear) -> Mapping[str, tuple[int, ...]]:
        """Checkpoint tensors that make up this layer, with their shapes."""
        ...

    def bind(self, layer: Linear, tensors: Mapping[str, Array]) -> Array:
        """Repack after loading; what it returns is the layer's ``weight`` from then on."""
        ...

    def apply(self, ops: Ops, x: Array, weight: Array) -> Array:
        """The layer's output."""
        ...

    def reference(self, layer: Linear, tensors: Mapping[str, Any]) -> np.ndarray[Any, Any]:
        """The dequantized weight (out, in) in float32: the oracle of the scheme's test."""
        ...
