"""Every op in jnp. What is rounded where is said by the torch references: platforms/torch/ops.py.

float32 means float32: products of matrices do not fall back to the chip's faster, coarser ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax, nn

from dovetail.core.contracts.ops import OP_NAMES
from dovetail.core.errors import UnsupportedError

__all__ = ["DenseLinear", "exact", "references"]


class DenseLinear(NamedTuple):
    """The bound weight of a linear layer: W (out, in) and perhaps b (out,)."""

    weight: Array
    bias: Array | None = None


IntegerWeight = tuple[Array, Array, Array | None]
"""The bound weight of an integer op: W (out, groups, inputs of one), scales (out, groups), bias."""


def exact(x: Array) -> lax.Precision | None:
    """The precision of products with x: full for float32, the chip's own for 16 bits."""
    return lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def embedding(ids_T: Array, table_VD: Array) -> Array:
    """Rows of a table."""
    return jnp.take(table_VD, ids_T, axis=0, mode="clip")


def linear(x: Array, weight: DenseLinear) -> Array:
    """Products are summed in float32 and rounded once, after the bias."""
    out = jnp.matmul(x, weight.weight.T, precision=exact(x), preferred_element_type=jnp.float32)
    return _biased(out, weight.bias, x)


def int8_weight(codes: Array, scales: Array, bias: Array | None) -> IntegerWeight:
    """One group."""
    return codes[:, None], scales[:, None], bias


def int4_weight(codes: Array, scales: Array, bias: Array | None) -> IntegerWeight:
    """Taken apart."""
    halves = jnp.stack((codes & 15, codes >> 4), -1).astype(jnp.int8) - 8
    return halves.reshape(*scales.shape, -1), scales, bias


def int8_linear(x: Array, weight: IntegerWeight) -> Array:
    """Sums of groups are integers; the rest is float32."""
    codes, scales, bias = weight
    wide = x.astype(jnp.float32)
    largest = jnp.abs(wide).max(-1, keepdims=True)
    steps = jnp.where(largest / 127 < 2.0**-126, 1, largest / 127)
    # The largest of NaN and a number may be the number.
    steps = jnp.where(jnp.isfinite(wide).all(-1, keepdims=True), steps, jnp.nan)
    q = jnp.rint(wide / steps).astype(jnp.int8).reshape(*x.shape[:-1], *codes.shape[1:])
    sums = jnp.einsum("...gi,ogi->...og", q, codes, preferred_element_type=jnp.int32)
    return _biased((sums * scales).sum(-1) * steps, bias, x)


int4_linear = int8_linear


def _biased(out: Array, bias: Array | None, x: Array) -> Array:
    """In float32 with the bias as the activations' dtype has it, then rounded to that dtype."""
    whole = out if bias is None else out + bias.astype(x.dtype).astype(jnp.float32)
    return whole.astype(x.dtype)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Normed in float32, then multiplied in the weight's dtype."""
    wide = x.astype(jnp.float32)
    normed = wide * lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True) + eps)
    return (weight * normed.astype(weight.dtype)).astype(x.dtype)


def add_rms_norm(x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """The sum is rounded to the activations' dtype before it is normed."""
    total = x + residual
    return rms_norm(total, weight, eps), total


add, relu = jnp.add, nn.relu


def scale(x: Array, factor: float) -> Array:
    """By a factor of x's dtype."""
    return x * jnp.asarray(factor, x.dtype)


def layer_norm(x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
    """All of it in float32, with weight and bias as the activations' dtype has them."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(centred * centred, -1, keepdims=True) + eps)
    return _biased(normed * weight.astype(x.dtype).astype(jnp.float32), bias, x)


def rotary(x_THE: Array, cos_TF: Array, sin_TF: Array) -> Array:
    """Entries beyond the first 2F of a head stay as they are."""
    half = cos_TF.shape[-1]
    cos, sin = cos_TF[:, None], sin_TF[:, None]
    wide = x_THE[..., : 2 * half].astype(jnp.promote_types(x_THE.dtype, cos_TF.dtype))
    a, b = wide[..., :half], wide[..., half:]
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1).astype(x_THE.dtype)
    return jnp.concatenate([turned, x_THE[..., 2 * half :]], -1)


def silu_and_mul(gate_up: Array) -> Array:
    """The first half of the last axis is the gate."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return silu(gate) * up


def gelu_tanh_and_mul(gate_up: Array) -> Array:
    """The first half of the last axis is the gate."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return gelu_tanh(gate) * up


def gelu(x: Array) -> Array:
    """In float32."""
    return nn.gelu(x.astype(jnp.float32), approximate=False).astype(x.dtype)


def gelu_tanh(x: Array) -> Array:
    """In float32."""
    return nn.gelu(x.astype(jnp.float32), approximate=True).astype(x.dtype)


def silu(x: Array) -> Array:
    """In float32."""
    return nn.silu(x.astype(jnp.float32)).astype(x.dtype)


def soft_cap(x: Array, cap: float) -> Array:
    """Smoothly within -cap and cap."""
    return cap * jnp.tanh(x / cap)


def attention(*_: Any) -> Any:
    """Bound by the runner. Raises UnsupportedError: a reference would need a cache layout."""
    raise UnsupportedError("The op attention has no reference: the runner binds it to a backend.")


def all_reduce(x: Array) -> Array:
    """The identity: the runner binds the sum over devices where several share a layer."""
    return x


def references() -> dict[str, Callable[..., Any]]:
    """Every op by name, complete: ``OP_NAMES`` are its keys."""
    return {name: globals()[name] for name in OP_NAMES}
