"""Fills a native model's declared parameters with tensors, bound for the platform."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor as TorchTensor

from dovetail.core.contracts.attention import AttentionBackend, AttentionSpec
from dovetail.core.contracts.model import Constant, Linear, Model, StepInputs
from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.registry import find_model
from dovetail.core.models.weights import (
    Dummy,
    Leaf,
    Source,
    align,
    assemble,
    check,
    fill,
    leaves,
    open_checkpoint,
)
from dovetail.core.types import IntArray
from dovetail.platforms.torch.dtypes import from_numpy, torch_dtype
from dovetail.platforms.torch.ops import references
from dovetail.platforms.torch.platform import TorchPlatform

__all__ = ["LoadedModel", "RunnableModel", "load_model"]


class RunnableModel(Protocol):
    """A model with its weights on the device, as the runner uses it."""

    vocab_size: int
    """Width of the logits."""
    attention_specs: tuple[AttentionSpec, ...]
    """One per layer, in order."""

    def bind_attention(self, backend: AttentionBackend) -> None:
        """Attend with this backend from now on. Called once, before any step."""
        ...

    def positions(self, positions_T: IntArray) -> IntArray:
        """Positions as the model counts them."""
        ...

    def forward(self, inputs: StepInputs, caches: Sequence[Any]) -> tuple[TorchTensor, list[Any]]:
        """Hidden states (T, D) and the caches, one per layer."""
        ...

    def logits(self, hidden_ND: TorchTensor) -> TorchTensor:
        """Logits (N, V) of some rows of the hidden states."""
        ...

    def describe(self) -> dict[str, str]:
        """What was chosen, for the start-up banner."""
        ...


class LoadedModel:
    """A native model with its weights and ops, ready to run.

    Args:
        model: The definition.
        weights: Its tree, with tensors and bound linear layers as leaves.
        table: The references and the platform's overrides.
    """

    def __init__(self, model: Model, weights: dict[str, Any], table: OpTable) -> None:
        self._model = model
        self._weights = weights
        self._table = table
        self._ops = table.bind()
        self.vocab_size = model.vocab_size
        self.attention_specs: tuple[AttentionSpec, ...] = model.attention_specs()

    def bind_attention(self, backend: AttentionBackend) -> None:
        """Make the backend the ``attention`` op."""
        self._ops.attention = backend.attend

    def positions(self, positions_T: IntArray) -> IntArray:
        """Positions as the model counts them."""
        return self._model.positions(positions_T)

    def forward(self, inputs: StepInputs, caches: Sequence[Any]) -> tuple[TorchTensor, list[Any]]:
        """Hidden states (T, D) and the caches."""
        return self._model.forward(self._ops, self._weights, inputs, caches)

    def logits(self, hidden_ND: TorchTensor) -> TorchTensor:
        """Logits (N, V)."""
        logits: TorchTensor = self._model.logits(self._ops, self._weights, hidden_ND)
        return logits

    def describe(self) -> dict[str, str]:
        """Which ops are not the references."""
        own = ", ".join(f"{name}: {op.origin}" for name, op in self._table.overrides.items())
        return {"ops": own} if own else {}


def load_model(
    platform: TorchPlatform, config: RunnerConfig
) -> Generator[tuple[int, int], None, RunnableModel]:
    """Load the model in the way that was decided; yields (bytes done, bytes in all).

    Raises:
        CheckpointError: A tensor is missing, unknown or of the wrong shape.
        UnsupportedError: The quantization or a setting of the model is not known here.
    """
    if config.quantization is not None:
        raise UnsupportedError(
            f"Quantization {config.quantization!r} has no kernel on this platform;"
            " leave --quantization out, or use an unquantized checkpoint."
        )
    if config.model_impl == "transformers":
        from dovetail.platforms.torch.transformers_model import load_transformers_model

        return (yield from load_transformers_model(platform, config))
    return (yield from _load_native(platform, config))


def _load_native(
    platform: TorchPlatform, config: RunnerConfig
) -> Generator[tuple[int, int], None, LoadedModel]:
    architectures = config.hf_config.get("architectures") or []
    model_class = find_model(architectures)
    if model_class is None:
        raise UnsupportedError(f"There is no native model for {architectures}.")
    model = model_class.from_config(config.hf_config, max_model_len=config.max_model_len)
    tree = model.weights()
    source: Source
    if config.load_format == "dummy":
        source = Dummy(tree, config.dtype, config.seed)
    else:
        source = align(open_checkpoint(config.model_path), tree)
        check(tree, source, model.ignored)
    binder = _Binder(platform, config, source)
    bound: dict[str, Any] = {}
    done = 0
    for path, leaf in leaves(tree):
        bound[path], num_bytes = binder.bind(leaf)
        done += num_bytes
        yield done, max(source.total_bytes, done)
    table = OpTable(references())
    platform.override_ops(table)
    return LoadedModel(model, fill(tree, bound), table)


class _Binder:
    """Turns declarations into tensors and bound layers."""

    def __init__(self, platform: TorchPlatform, config: RunnerConfig, source: Source) -> None:
        self._platform = platform
        self._dtype = torch_dtype(config.dtype)
        self._source = source

    def bind(self, leaf: Leaf) -> tuple[Any, int]:
        """What the model will be given for a leaf, and the bytes that were read for it."""
        if isinstance(leaf, Linear):
            for name in leaf.sources:
                self._source.read_ahead(name)
        parts = assemble(leaf, self._source)
        num_bytes = sum(array.nbytes for array in (*parts.weights, *parts.biases))
        if isinstance(leaf, Linear):
            bias = self._rows(parts.biases) if parts.biases else None
            return self._platform.bind_linear(self._rows(parts.weights), bias), num_bytes
        tensor = self._tensor(parts.weights[0])
        if isinstance(leaf, Constant):
            return tensor, 0
        # A weight with an offset keeps the precision that the sum has.
        return tensor if leaf.offset else tensor.to(self._dtype), num_bytes

    def _rows(self, arrays: Sequence[Any]) -> TorchTensor:
        """The arrays one below the other; without a copy if there is one, of the right dtype."""
        tensors = [self._tensor(array).to(self._dtype) for array in arrays]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def _tensor(self, array: Any) -> TorchTensor:
        return from_numpy(array).to(self._platform.device)
