"""The linear layers of a model, some or all of them quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from dovetail.core.contracts.model import Linear, WeightTree
from dovetail.core.contracts.quant import QuantScheme, StoredTensor
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.models.weights import (
    Leaf,
    Parts,
    QuantizedWeight,
    Source,
    assemble,
    leaf_needs,
    leaves,
)

__all__ = ["QuantizedLayers"]


class QuantizedLayers:
    """Which layers a scheme has, and how their arrays come about.

    Args:
        tree: The model's declaration.
        config: Whether the checkpoint is quantized already (``quantization_config``).
        scheme: None: no layer is quantized.
    """

    def __init__(self, tree: WeightTree, config: RunnerConfig, scheme: QuantScheme | None) -> None:
        self._tree = tree
        self._scheme = scheme
        self._is_stored = (
            config.load_format != "dummy"
            and config.hf_config.get("quantization_config") is not None
        )

    def scheme_of(self, path: str, leaf: Leaf) -> QuantScheme | None:
        """The scheme of a leaf; None if it keeps its weight."""
        if self._scheme is None or not isinstance(leaf, Linear):
            return None
        scheme = self._scheme.for_layer(path, leaf)
        return None if scheme.refuses(path, leaf) else scheme

    def needs(self) -> dict[str, tuple[int, ...]]:
        """Every tensor that the checkpoint must have, with its shape."""
        found: dict[str, tuple[int, ...]] = {}
        for path, leaf in leaves(self._tree):
            scheme = self.scheme_of(path, leaf)
            if scheme is None or not self._is_stored or not isinstance(leaf, Linear):
                found.update(leaf_needs(leaf))
                continue
            found.update((t.name, t.shape) for roles in scheme.stored(leaf) for t in roles.values())
            found.update(need for need in leaf_needs(leaf) if need[0] in leaf.bias_sources)
        return found

    def assemble(self, path: str, leaf: Leaf, source: Source) -> Parts:
        """The arrays of a leaf: its weights, or what the scheme makes of them."""
        scheme = self.scheme_of(path, leaf)
        if scheme is None or not isinstance(leaf, Linear):
            return _whole(leaf, source)
        if self._is_stored:
            params = scheme.read(leaf, [_stored(roles, source) for roles in scheme.stored(leaf)])
        else:
            weights = _whole(leaf, source).weights
            params = scheme.quantize(weights[0] if len(weights) == 1 else np.concatenate(weights))
        biases = tuple(source.tensor(name) for name in leaf.bias_sources)
        quantized = QuantizedWeight(scheme=scheme, params=params)
        return Parts(weights=(), biases=biases, quantized=quantized)


def _whole(leaf: Leaf, source: Source) -> Parts:
    """An unquantized leaf; a layer is read ahead, for nearly all of a checkpoint is layers."""
    if isinstance(leaf, Linear):
        for name in leaf.sources:
            source.read_ahead(name)
    return assemble(leaf, source)


def _stored(
    roles: Mapping[str, StoredTensor], source: Source
) -> Mapping[str, np.ndarray[Any, Any]]:
    for tensor in roles.values():
        source.read_ahead(tensor.name)
    return {role: source.tensor(tensor.name) for role, tensor in roles.items()}
