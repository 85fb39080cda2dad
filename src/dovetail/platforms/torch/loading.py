"""Fills a native model's declared parameters with tensors, bound for the platform."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor as TorchTensor

from dovetail.core.contracts.attention import AttentionBackend, AttentionSpec, RotaryAttention
from dovetail.core.contracts.model import Constant, Linear, Model, StepInputs, Tensor
from dovetail.core.contracts.observation import OpsView, Wrap
from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.quant import QuantScheme
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.load import Unread, define, read_weights
from dovetail.core.models.weights import Leaf, Parts, leaves
from dovetail.core.plugins.quant import make_scheme
from dovetail.core.types import IntArray
from dovetail.platforms.torch.dtypes import torch_dtype
from dovetail.platforms.torch.ops import QuantizedLinear, references
from dovetail.platforms.torch.platform import TorchPlatform

__all__ = [
    "LoadedModel",
    "RunnableModel",
    "chosen_scheme",
    "load_model",
    "op_table",
    "chosen_kernels",
]


_REFERENCE = "the reference of the op"


class RunnableModel(Protocol):
    """A model with its weights on the device, as the runner uses it."""

    vocab_size: int
    """Width of the logits."""
    attention_specs: tuple[AttentionSpec, ...]
    """One per layer, in order."""
    narrows: bool
    """``forward`` heeds ``StepInputs.wanted``."""

    def bind_attention(self, backend: AttentionBackend) -> None:
        """Attend with this backend from now on. Called once, before any step."""
        ...

    def wrap_ops(self, wrap: Wrap) -> AbstractContextManager[OpsView]:
        """See ``ObservableRunner``; of the model alone."""
        ...

    def positions(self, positions_T: IntArray) -> IntArray:
        """Positions as the model counts them."""
        ...

    def forward(self, inputs: StepInputs, caches: Sequence[Any]) -> tuple[TorchTensor, list[Any]]:
        """Hidden states, (T, D) or of the wanted tokens, and the caches, one per layer."""
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
        kernels: What was chosen among them, for the start-up banner.
    """

    def __init__(
        self, model: Model, weights: dict[str, Any], table: OpTable, kernels: dict[str, str]
    ) -> None:
        self._model = model
        self._weights = weights
        self._kernels = kernels
        self._ops = table.bind()
        self.vocab_size = model.vocab_size
        self.attention_specs: tuple[AttentionSpec, ...] = model.attention_specs()
        self.narrows = model.narrows

    def bind_attention(self, backend: AttentionBackend) -> None:
        """Make the backend the ``attention`` op, and ``rotary_attention`` if it has that too."""
        self._ops.attention = backend.attend
        if isinstance(backend, RotaryAttention):
            self._ops.rotary_attention = backend.rotary_attend

    @contextmanager
    def wrap_ops(self, wrap: Wrap) -> Iterator[OpsView]:
        """See ``ObservableRunner``; of the model alone."""
        ops = vars(self._ops)
        plain = dict(ops)
        ops.update({name: wrap(name, function) for name, function in plain.items()})
        paths = {id(bound): path for path, bound in leaves(self._weights)}
        try:
            yield OpsView(parameters=paths, num_bytes=_num_bytes)
        finally:
            ops.update(plain)

    def positions(self, positions_T: IntArray) -> IntArray:
        """Positions as the model counts them."""
        return self._model.positions(positions_T)

    def forward(self, inputs: StepInputs, caches: Sequence[Any]) -> tuple[TorchTensor, list[Any]]:
        """Hidden states, (T, D) or of the wanted tokens, and the caches."""
        return self._model.forward(self._ops, self._weights, inputs, caches)

    def logits(self, hidden_ND: TorchTensor) -> TorchTensor:
        """Logits (N, V)."""
        logits: TorchTensor = self._model.logits(self._ops, self._weights, hidden_ND)
        return logits

    def describe(self) -> dict[str, str]:
        """Which ops are not the references."""
        return self._kernels


def _num_bytes(value: object) -> int:
    if isinstance(value, TorchTensor):
        return value.nbytes
    return sum(map(_num_bytes, value)) if isinstance(value, tuple | list) else 0


def op_table(platform: TorchPlatform) -> OpTable:
    """The references, and what the platform puts in their place."""
    table = OpTable(references())
    platform.override_ops(table)
    return table


def chosen_kernels(
    table: OpTable, config: RunnerConfig, scheme: QuantScheme | None
) -> dict[str, str]:
    """Which ops are the platform's own, and whose a scheme's are, for the start-up banner."""
    own = {name: op.origin for name, op in table.overrides.items()}
    by_origin: dict[str, list[str]] = {}
    for name, origin in own.items():
        by_origin.setdefault(origin, []).append(name)
    said = "; ".join(f"{origin}: {', '.join(names)}" for origin, names in by_origin.items())
    lines = {"ops": said} if own else {}
    if scheme is not None:
        used = (f"{name}: {own.get(name, _REFERENCE)}" for name in scheme.ops)
        lines["quantization"] = f"{config.quantization} ({', '.join(used)})"
    return lines


def chosen_scheme(config: RunnerConfig) -> QuantScheme | None:
    """The scheme of the linear layers, if there is one.

    Raises:
        SelectionError: It is not installed.
        UnsupportedError: The transformers library's code is to run, which has layers of its own.
    """
    if config.quantization is None:
        return None
    if config.model_impl == "transformers":
        raise UnsupportedError(
            f"quantization={config.quantization}: only native models are quantized, not those that"
            " the transformers library's code runs; leave --quantization out, or use an"
            " unquantized checkpoint"
        )
    return make_scheme(config.quantization, config.hf_config)


def load_model(
    platform: TorchPlatform, config: RunnerConfig
) -> Generator[tuple[int, int], None, RunnableModel]:
    """Load the model in the way that was decided; yields (bytes done, bytes in all).

    Raises:
        CheckpointError: A tensor is missing, unknown or of the wrong shape.
        UnsupportedError: The quantization or a setting of the model is not known here.
    """
    scheme = chosen_scheme(config)
    if config.model_impl == "transformers":
        from dovetail.platforms.torch.transformers_model import load_transformers_model

        return (yield from load_transformers_model(platform, config))
    model = define(config)
    table = op_table(platform)
    binder = _Binder(platform, config, table)
    weights = yield from read_weights(model, config, binder, scheme)
    if binder.kept is not None:
        binder.kept.finish()
    return LoadedModel(model, weights, table, chosen_kernels(table, config, scheme))


class _Binder:
    """Turns declarations and their arrays into tensors and bound layers."""

    def __init__(self, platform: TorchPlatform, config: RunnerConfig, table: OpTable) -> None:
        self._platform = platform
        self._upload = platform.uploader()
        self._ops = table.bind()
        self._dtype = torch_dtype(config.dtype)
        self._tables: dict[str, TorchTensor] = {}
        """Tensors on the device by the names of their sources: what output layers are tied to."""
        self.kept = platform.kept_layers(config)

    def __call__(self, path: str, leaf: Leaf, unread: Unread) -> Any:
        """What the model will be given for a leaf."""
        if not isinstance(leaf, Linear):
            return self._array(leaf, unread.read())
        bound = None if self.kept is None else self.kept.find(path, leaf)
        if bound is None:
            bound = self._layer(leaf, unread)
            if self.kept is not None:
                self.kept.keep(path, leaf, bound)
        scheme = unread.scheme
        return bound if scheme is None else QuantizedLinear(scheme, self._ops, bound)

    def _layer(self, leaf: Linear, unread: Unread) -> Any:
        """As ``bind_rows`` or the layer's scheme binds it."""
        parts = unread.read()
        bias = torch.cat(self._tensors(parts.biases)) if parts.biases else None
        if unread.scheme is not None and parts.quantized is not None:
            params = {name: self._tensor(a) for name, a in parts.quantized.params.items()}
            return unread.scheme.bind(self._ops, params, bias)
        table = self._tables.get(leaf.sources[0]) if leaf.tied_to else None
        weights = self._tensors(parts.weights) if table is None else [table]
        return self._platform.bind_rows(weights, bias)

    def _array(self, leaf: Tensor | Constant, parts: Parts) -> TorchTensor:
        tensor = self._tensor(parts.weights[0])
        if not isinstance(leaf, Tensor):
            return tensor
        # A weight with an offset keeps the precision that the sum has.
        tensor = tensor if leaf.offset else tensor.to(self._dtype)
        self._tables[leaf.source] = tensor
        return tensor

    def _tensors(self, arrays: Sequence[Any]) -> list[TorchTensor]:
        """In the dtype of the model."""
        return [self._tensor(array).to(self._dtype) for array in arrays]

    def _tensor(self, array: Any) -> TorchTensor:
        return self._upload(array)
