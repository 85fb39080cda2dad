"""Loading a native model on any platform: its definition, and its weights leaf by leaf."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from dovetail.core.contracts.model import Linear, Model, Tensor
from dovetail.core.contracts.quant import QuantScheme
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.quantized import QuantizedLayers
from dovetail.core.models.registry import find_model
from dovetail.core.models.split import share_of_leaf
from dovetail.core.models.weights import (
    Dummy,
    Leaf,
    Parts,
    Source,
    align,
    check,
    fill,
    leaves,
    open_checkpoint,
)
from dovetail.core.types import ITEM_SIZE

__all__ = ["Unread", "define", "parameter_bytes", "read_weights", "weight_bytes"]


class Unread:
    """A leaf whose arrays are read when they are asked for.

    Args:
        scheme: What the layer is quantized by; None: it keeps its weight.
        assemble: Reads them.
    """

    def __init__(self, scheme: QuantScheme | None, assemble: Callable[[], Parts]) -> None:
        self.scheme = scheme
        self._assemble = assemble
        self.num_bytes: int | None = None
        """Of what was read; None: nothing was."""

    def read(self) -> Parts:
        """The arrays, which must not be written to."""
        parts = self._assemble()
        self.num_bytes = parts.num_bytes
        return parts


def define(config: RunnerConfig) -> Model:
    """The definition of the checkpoint's model. Reads no weights.

    Raises:
        CheckpointError: Its config lacks something.
        UnsupportedError: There is no native model for it, or not with these settings.
    """
    architectures = config.hf_config.get("architectures") or []
    model_class = find_model(architectures)
    if model_class is None:
        raise UnsupportedError(f"There is no native model for {architectures}.")
    return model_class.from_config(config.hf_config, max_model_len=config.max_model_len)


def read_weights(
    model: Model,
    config: RunnerConfig,
    bind: Callable[[str, Leaf, Unread], Any],
    scheme: QuantScheme | None = None,
) -> Generator[tuple[int, int], None, dict[str, Any]]:
    """Read and bind every parameter; yields (bytes done, bytes in all), returns the filled tree.

    Args:
        model: The definition.
        config: Where the weights are, or the seed of made-up ones.
        bind: From a leaf's path, the leaf and its arrays to what the model is given.
        scheme: Of the linear layers, where it does not refuse them.

    Raises:
        CheckpointError: Tensors are missing, unknown or of the wrong shape; names them.
        UnsupportedError: The scheme cannot quantize these weights, or cannot read them.
    """
    tree = model.weights()
    layers = QuantizedLayers(tree, config, scheme)
    source: Source
    if config.load_format == "dummy":
        source = Dummy(tree, config.dtype, config.seed)
    else:
        source = align(open_checkpoint(config.model_path), tree)
        check(layers.needs(), source, model.ignored)
    bound: dict[str, Any] = {}
    done = 0
    for path, leaf in leaves(tree):
        layer_scheme = layers.scheme_of(path, leaf)
        unread = Unread(layer_scheme, partial(layers.assemble, path, leaf, source))
        bound[path] = bind(path, leaf, unread)
        if isinstance(leaf, Tensor | Linear):
            num_bytes = unread.num_bytes
            if num_bytes is None:
                num_bytes = _leaf_bytes(leaf, layer_scheme, ITEM_SIZE[config.dtype])
            done += num_bytes
        yield done, max(source.total_bytes, done)
    return fill(tree, bound)


def weight_bytes(model: Model, config: RunnerConfig, scheme: QuantScheme | None = None) -> int:
    """Bytes of all parameters on one device."""
    return sum(parameter_bytes(model, config, scheme).values())


def parameter_bytes(
    model: Model, config: RunnerConfig, scheme: QuantScheme | None = None
) -> dict[str, int]:
    """Bytes of each parameter on one device, by its path in the model's tree.

    A tied output layer counts as a layer of its own, for a platform may repack it.
    """
    tree, size = model.weights(), config.tensor_parallel_size
    layers, item = QuantizedLayers(tree, config, scheme), ITEM_SIZE[config.dtype]
    return {
        path: _leaf_bytes(share_of_leaf(leaf, size), layers.scheme_of(path, leaf), item)
        for path, leaf in leaves(tree)
    }


def _leaf_bytes(leaf: Leaf, scheme: QuantScheme | None, item: int) -> int:
    match leaf:
        case Tensor():
            return math.prod(leaf.shape) * (ITEM_SIZE["float32"] if leaf.offset else item)
        case Linear():
            rows = sum(leaf.out_features)
            bias = rows * item if leaf.bias_sources else 0
            return bias + (scheme.num_bytes(leaf) if scheme else rows * leaf.in_features * item)
        case _:
            return leaf.make().nbytes
