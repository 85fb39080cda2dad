"""The torch reference of every op: plain functions that say what an op means.

Where a weight and an activation meet, the product is taken in the weight's dtype and the result
returned in the activation's. A norm weight in the model's dtype is thus applied as Llama does, one
kept in float32 as Gemma does; with everything in float32 the two are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.ops import OP_NAMES, Ops
from dovetail.core.contracts.quant import QuantScheme
from dovetail.core.errors import UnsupportedError
from dovetail.platforms.torch import integer_ops

__all__ = ["DenseLinear", "QuantizedLinear", "references"]


class DenseLinear:
    """The bound weight of an unquantized layer: W (out, in) and perhaps b (out,), of one dtype."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ W.T + b``: (..., in) to (..., out)."""
        return functional.linear(x, self.weight, self.bias)


class QuantizedLinear:
    """A quantized layer, as ``linear`` takes it.

    Args:
        scheme: The layer's.
        ops: The platform's, overrides included.
        bound: What the scheme has bound the layer to.
    """

    __slots__ = ("_ops", "bound", "scheme")

    def __init__(self, scheme: QuantScheme, ops: Ops, bound: Any) -> None:
        self.scheme = scheme
        self._ops = ops
        self.bound = bound

    def __call__(self, x: Tensor) -> Tensor:
        """``x @ W.T + b``: (..., in) to (..., out)."""
        out: Tensor = self.scheme.apply(self._ops, x, self.bound)
        return out


def embedding(ids_T: Tensor, table_VD: Tensor) -> Tensor:
    """Rows of a table."""
    return functional.embedding(ids_T, table_VD)


def linear(x: Tensor, weight: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a bound weight: a ``DenseLinear``, or what a quantization scheme made."""
    return weight(x)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normed in float32, then multiplied in the weight's dtype."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight * normed.to(weight.dtype)).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum is rounded to the activations' dtype before it is normed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def add(x: Tensor, y: Tensor) -> Tensor:
    """Rounded once."""
    return x + y


def scale(x: Tensor, factor: float) -> Tensor:
    """By a factor of x's dtype, made where x is."""
    return x * x.new_full((), factor)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Mean and variance in float32, as torch computes them."""
    weight = weight.to(x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    return functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rotary(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """Entries beyond the first 2F of a head stay as they are."""
    half = cos_TF.shape[-1]
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    # One dtype for all operands: kernels of mixed dtypes are slow on CPUs.
    exact = torch.promote_types(x_THE.dtype, cos_TF.dtype)
    a, b = x_THE[..., : 2 * half].to(exact).chunk(2, dim=-1)
    rest = x_THE[..., 2 * half :]
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x_THE.dtype)
    return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """The first half of the last axis is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """The first half of the last axis is the gate."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.gelu(gate, approximate="tanh") * up


def gelu(x: Tensor) -> Tensor:
    """Hendrycks and Gimpel, 2016."""
    return functional.gelu(x)


def gelu_tanh(x: Tensor) -> Tensor:
    """Its approximation, equation 2 of the same."""
    return functional.gelu(x, approximate="tanh")


def relu(x: Tensor) -> Tensor:
    """max(x, 0)."""
    return functional.relu(x)


def silu(x: Tensor) -> Tensor:
    """x times its logistic function (Elfwing et al., 2017)."""
    return functional.silu(x)


def soft_cap(x: Tensor, cap: float) -> Tensor:
    """Smoothly within -cap and cap."""
    return cap * torch.tanh(x / cap)


def attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, cache: Any, plan: object, spec: AttentionSpec
) -> tuple[Tensor, Any]:
    """Bound by the runner. Raises UnsupportedError: a reference would need a cache layout."""
    raise UnsupportedError(
        "The op attention has no reference: it is bound to an attention backend. Set the op "
        "table's attention to the backend's attend before a model runs."
    )


def all_reduce(x: Tensor) -> Tensor:
    """The identity: one device shares with nobody."""
    return x


def references() -> dict[str, Callable[..., Any]]:
    """Every op by name, complete: ``OP_NAMES`` are its keys."""
    known = vars(integer_ops) | globals()
    return {name: known[name] for name in OP_NAMES}
