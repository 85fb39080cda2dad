"""The quantization contract: how the weights of linear layers are stored, and computed with.

A scheme is offered as a class through the entry-point group ``dovetail.quant``; the entry point's
name is what ``--quantization`` and a checkpoint's ``quantization_config.quant_method`` say. It
knows no platform: it makes arrays with numpy, has the ops bind them once, and computes with ops,
which platforms may override.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dovetail.core.contracts.model import Linear
from dovetail.core.contracts.ops import Ops
from dovetail.core.errors import PluginError, UnsupportedError
from dovetail.core.types import Array

__all__ = ["BoundParams", "QuantParams", "QuantScheme", "StoredTensor"]

QuantParams = Mapping[str, np.ndarray[Any, Any]]
"""The arrays that stand for a layer's weight, by names of the scheme's own."""


@dataclass(frozen=True, kw_only=True)
class StoredTensor:
    """A tensor of a quantized checkpoint."""

    name: str
    shape: tuple[int, ...]


class BoundParams(NamedTuple):
    """A layer that nothing was packed for."""

    params: Mapping[str, Array]
    """The arrays of its ``QuantParams``, on the device."""
    bias: Array | None
    """(out,) in the dtype of the activations."""


class QuantScheme(ABC):
    """One scheme, made once per model.

    Args:
        settings: The checkpoint's ``quantization_config``; empty if it is not quantized and is to
            be quantized while it is loaded.

    Raises:
        UnsupportedError: A setting cannot be honoured.
    """

    ops: ClassVar[tuple[str, ...]] = ()
    """The ops that ``apply`` calls, those of other schemes that it leaves layers to included: users
    are told whose kernels they get."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings

    def for_layer(self, path: str, layer: Linear) -> QuantScheme:
        """The scheme of one layer; everything else is asked of that one. Default: this one.

        Args:
            path: Of the layer in the model's tree of weights, such as ``layers.0.mlp.down``.
            layer: Its declaration.
        """
        return self

    def refuses(self, path: str, layer: Linear) -> str | None:
        """Why a layer keeps its weight as it is. Default: none does. As ``for_layer``."""
        return None

    def stored(self, layer: Linear) -> Sequence[Mapping[str, StoredTensor]]:
        """What a quantized checkpoint holds for each of the layer's sources, by role.

        Default: raises UnsupportedError, for a scheme that only quantizes while loading.
        """
        raise UnsupportedError(
            f"The quantization scheme {type(self).__name__} quantizes weights while it loads them;"
            " it reads no checkpoint that is quantized already."
        )

    def read(
        self, layer: Linear, tensors: Sequence[Mapping[str, np.ndarray[Any, Any]]]
    ) -> QuantParams:
        """The params of a layer from the tensors of its sources, which must not be written to.

        Called only if ``stored`` says that there are any. Default: raises PluginError.
        """
        raise PluginError(
            f"The quantization scheme {type(self).__name__} names stored tensors and does not read"
            " them: it needs a method read beside stored."
        )

    def quantize(self, weight: np.ndarray[Any, Any]) -> QuantParams:
        """The params of a weight (out, in), of any float dtype.

        Default: raises UnsupportedError, for a scheme that only reads.
        """
        raise UnsupportedError(
            f"The quantization scheme {type(self).__name__} reads checkpoints that are quantized"
            " already; it quantizes none itself."
        )

    @abstractmethod
    def num_bytes(self, layer: Linear) -> int:
        """Bytes of a layer's params."""

    def bind(self, ops: Ops, params: Mapping[str, Array], bias: Array | None) -> Any:
        """What ``apply`` computes with: called once per layer, at load.

        Ops such as ``int8_weight`` pack arrays here. What the platform makes of a weight is kept,
        the params are not, unless they are returned. Default: a ``BoundParams``.

        Args:
            ops: The platform's.
            params: The layer's, on the device.
            bias: (out,) in the dtype of the activations.
        """
        return BoundParams(params, bias)

    @abstractmethod
    def apply(self, ops: Ops, x: Array, bound: Any) -> Array:
        """``x @ W.T + b`` in the dtype of x, (..., in) to (..., out).

        Args:
            ops: The platform's.
            x: Activations; a scheme may round them to as few bits as it says.
            bound: What ``bind`` returned.
        """

    @abstractmethod
    def reference(self, params: QuantParams) -> np.ndarray[Any, np.dtype[np.float32]]:
        """The weight (out, in) that the params stand for: what ``apply`` is compared with."""
