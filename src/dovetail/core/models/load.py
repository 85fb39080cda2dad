"""Loading a native model on any platform: its definition, and its weights leaf by leaf."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from typing import Any

from dovetail.core.contracts.model import Linear, Model, Tensor
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.registry import find_model
from dovetail.core.models.split import share_of_leaf
from dovetail.core.models.weights import (
    Dummy,
    Leaf,
    Parts,
    Source,
    align,
    assemble,
    check,
    fill,
    leaves,
    open_checkpoint,
)
from dovetail.core.types import ITEM_SIZE

__all__ = ["define", "read_weights", "weight_bytes"]


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
    model: Model, config: RunnerConfig, bind: Callable[[Leaf, Parts], Any]
) -> Generator[tuple[int, int], None, dict[str, Any]]:
    """Read and bind every parameter; yields (bytes done, bytes in all), returns the filled tree.

    Args:
        model: The definition.
        config: Where the weights are, or the seed of made-up ones.
        bind: From a leaf and its arrays, which must not be written to, to what the model is given.

    Raises:
        CheckpointError: Tensors are missing, unknown or of the wrong shape; names them.
    """
    tree = model.weights()
    source: Source
    if config.load_format == "dummy":
        source = Dummy(tree, config.dtype, config.seed)
    else:
        source = align(open_checkpoint(config.model_path), tree)
        check(tree, source, model.ignored)
    bound: dict[str, Any] = {}
    done = 0
    for path, leaf in leaves(tree):
        if isinstance(leaf, Linear):
            for name in leaf.sources:
                source.read_ahead(name)
        parts = assemble(leaf, source)
        bound[path] = bind(leaf, parts)
        if isinstance(leaf, Tensor | Linear):
            done += parts.num_bytes
        yield done, max(source.total_bytes, done)
    return fill(tree, bound)


def weight_bytes(model: Model, config: RunnerConfig) -> int:
    """Bytes of all parameters on one device, in the model's dtype.

    A tied output layer counts as a layer of its own, for a platform may repack it.
    """
    size, item = config.tensor_parallel_size, ITEM_SIZE[config.dtype]
    return sum(_leaf_bytes(share_of_leaf(leaf, size), item) for _, leaf in leaves(model.weights()))


def _leaf_bytes(leaf: Leaf, item: int) -> int:
    match leaf:
        case Tensor():
            return math.prod(leaf.shape) * (ITEM_SIZE["float32"] if leaf.offset else item)
        case Linear():
            columns = leaf.in_features + bool(leaf.bias_sources)
            return sum(leaf.out_features) * columns * item
        case _:
            return leaf.make().nbytes
