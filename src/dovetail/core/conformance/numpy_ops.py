"""Every op of the table in numpy: what an op means, whatever the platform.

A result is computed in float64 and rounded to the activations' dtype once, at the end, so that it
is the best that the dtype allows. Where the op table defines a rounding on the way, it is done here
too: ``add_rms_norm`` norms the rounded sum, and ``rms_norm`` multiplies in the weight's dtype.
Arrays are numpy's, 16-bit floats those of ml_dtypes and numpy. Nothing is changed in place.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.ops import OP_NAMES, OpTable
from dovetail.core.errors import UnsupportedError

__all__ = [
    "NUMPY_DTYPES",
    "DenseWeight",
    "IntegerWeight",
    "NumpyArray",
    "bind",
    "dense_attention",
    "in_8_bits",
    "references",
]

NumpyArray = np.ndarray[Any, Any]

NUMPY_DTYPES: Mapping[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
}
"""Dtypes of weights and activations by their names."""


class DenseWeight:
    """The bound weight of a linear layer: W (out, in) and perhaps b (out,)."""

    def __init__(self, weight: NumpyArray, bias: NumpyArray | None = None) -> None:
        self.weight = _wide(weight)
        self.bias = None if bias is None else _wide(bias)

    def __call__(self, x: NumpyArray) -> NumpyArray:
        """``x @ W.T + b``, rounded once."""
        product = _wide(x) @ self.weight.T
        return _round(product if self.bias is None else product + self.bias, x)


class IntegerWeight:
    """The bound weight of an integer op: W (out, in), perhaps b (out,), and scales (out, groups).

    The groups are equal parts of the inputs.
    """

    def __init__(
        self, codes: NumpyArray, scales: NumpyArray, bias: NumpyArray | None = None
    ) -> None:
        self.groups = np.split(_wide(codes), scales.shape[1], axis=1)
        self.scales = _wide(scales.T)
        self.bias = None if bias is None else _wide(bias)


def embedding(ids_T: NumpyArray, table_VD: NumpyArray) -> NumpyArray:
    """Rows of a table, exactly."""
    rows: NumpyArray = table_VD[ids_T]
    return rows


def linear(x: NumpyArray, weight: Callable[[NumpyArray], NumpyArray]) -> NumpyArray:
    """Apply a bound weight: a ``DenseWeight``, or a quantized layer."""
    return weight(x)


def int8_weight(codes: NumpyArray, scales: NumpyArray, bias: NumpyArray | None) -> IntegerWeight:
    """One group."""
    return IntegerWeight(codes, scales[:, None], bias)


def int8_linear(x: NumpyArray, weight: IntegerWeight) -> NumpyArray:
    """The activations' codes are those of float32; the rest is exact and rounded once."""
    q, steps = in_8_bits(x)
    parts = np.split(q, len(weight.groups), axis=-1)
    groups = zip(parts, weight.groups, weight.scales, strict=True)
    out = sum(part @ codes.T * scales for part, codes, scales in groups) * steps
    return _round(out if weight.bias is None else out + weight.bias, x)


def int4_weight(codes: NumpyArray, scales: NumpyArray, bias: NumpyArray | None) -> IntegerWeight:
    """Taken apart."""
    halves = np.stack((codes & 15, codes >> 4), -1).reshape(len(codes), -1)
    return IntegerWeight(halves.astype(np.int8) - 8, scales, bias)


def int4_linear(x: NumpyArray, weight: IntegerWeight) -> NumpyArray:
    """As ``int8_linear``, with several groups."""
    return int8_linear(x, weight)


def in_8_bits(x: NumpyArray) -> tuple[NumpyArray, NumpyArray]:
    """Codes (..., in) and steps (..., 1), both as float64: see ``Ops.int8_linear``."""
    single = x.astype(np.float32)
    largest = np.abs(single).max(-1, keepdims=True)
    steps = largest / np.float32(127)
    steps = np.where(steps < np.finfo(np.float32).tiny, np.float32(1), steps)
    is_number = np.isfinite(largest)
    codes = np.rint(np.where(is_number, single, 0) / np.where(is_number, steps, 1))
    return _wide(codes), np.where(is_number, _wide(steps), np.nan)


def rms_norm(x: NumpyArray, weight: NumpyArray, eps: float) -> NumpyArray:
    """Normed exactly, rounded to the weight's dtype, multiplied in it."""
    wide = _wide(x)
    normed = wide / np.sqrt((wide * wide).mean(-1, keepdims=True) + eps)
    return _round(_round(_wide(weight) * _wide(_round(normed, weight)), weight), x)


def add_rms_norm(
    x: NumpyArray, residual: NumpyArray, weight: NumpyArray, eps: float
) -> tuple[NumpyArray, NumpyArray]:
    """The norm of the rounded sum, and that sum."""
    total = _round(_wide(x) + _wide(residual), x)
    return rms_norm(total, weight, eps), total


def add(x: NumpyArray, y: NumpyArray) -> NumpyArray:
    """Rounded once."""
    return _round(_wide(x) + _wide(y), x)


def scale(x: NumpyArray, factor: float) -> NumpyArray:
    """The factor is rounded first."""
    return _round(_wide(x) * _wide(np.array(factor, x.dtype)), x)


def layer_norm(
    x: NumpyArray, weight: NumpyArray, bias: NumpyArray | None, eps: float
) -> NumpyArray:
    """Weight and bias are rounded to the activations' dtype first."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps)
    scaled = normed * _wide(_round(weight, x))
    return _round(scaled if bias is None else scaled + _wide(_round(bias, x)), x)


def rotary(x_THE: NumpyArray, cos_TF: NumpyArray, sin_TF: NumpyArray) -> NumpyArray:
    """Entries beyond the first 2F of a head stay as they are."""
    half = cos_TF.shape[-1]
    cos, sin = _wide(cos_TF)[:, None], _wide(sin_TF)[:, None]
    wide = _wide(x_THE)
    a, b = wide[..., :half], wide[..., half : 2 * half]
    turned = (a * cos - b * sin, b * cos + a * sin, wide[..., 2 * half :])
    return _round(np.concatenate(turned, -1), x_THE)


def silu_and_mul(gate_up: NumpyArray) -> NumpyArray:
    """The first half of the last axis is the gate."""
    gate, up = np.split(_wide(gate_up), 2, -1)
    return _round(_silu(gate) * up, gate_up)


def gelu_tanh_and_mul(gate_up: NumpyArray) -> NumpyArray:
    """The first half of the last axis is the gate."""
    gate, up = np.split(_wide(gate_up), 2, -1)
    return _round(_gelu_tanh(gate) * up, gate_up)


def gelu(x: NumpyArray) -> NumpyArray:
    """By the error function."""
    wide = _wide(x)
    erf = np.array([math.erf(value) for value in (wide / math.sqrt(2)).ravel().tolist()])
    return _round(0.5 * wide * (1 + erf.reshape(wide.shape)), x)


def gelu_tanh(x: NumpyArray) -> NumpyArray:
    """By the approximation."""
    return _round(_gelu_tanh(_wide(x)), x)


def relu(x: NumpyArray) -> NumpyArray:
    """Exact."""
    return _round(np.maximum(_wide(x), 0), x)


def silu(x: NumpyArray) -> NumpyArray:
    """``x * sigmoid(x)``."""
    return _round(_silu(_wide(x)), x)


def soft_cap(x: NumpyArray, cap: float) -> NumpyArray:
    """``cap * tanh(x / cap)``."""
    return _round(cap * np.tanh(_wide(x) / cap), x)


def attention(
    q_THE: NumpyArray,
    k_TKE: NumpyArray,
    v_TKE: NumpyArray,
    cache: Any,
    plan: object,
    spec: AttentionSpec,
) -> tuple[NumpyArray, Any]:
    """Bound by who runs a model. Raises UnsupportedError: it has no cache of its own."""
    raise UnsupportedError("the numpy op attention is bound to a cache before a model runs")


def all_reduce(x: NumpyArray) -> NumpyArray:
    """The identity: one device shares with nobody."""
    return x


def references() -> dict[str, Callable[..., Any]]:
    """Every op by name; ``OP_NAMES`` are the keys."""
    return {name: globals()[name] for name in OP_NAMES}


def bind(attend: Callable[..., tuple[NumpyArray, Any]]) -> Any:
    """The op table that a model runs on, with an attention."""
    ops = OpTable(references()).bind()
    ops.attention = attend
    return ops


def dense_attention(
    q_THE: NumpyArray, k_LKE: NumpyArray, v_LKE: NumpyArray, spec: AttentionSpec
) -> NumpyArray:
    """The last T of L positions of one sequence attend to all of them.

    Returns:
        (T, H, E) in the dtype of the queries.
    """
    num_queries, length = len(q_THE), len(k_LKE)
    group = spec.num_heads // spec.num_kv_heads
    q_HTE = _wide(q_THE).transpose(1, 0, 2)
    k_HLE, v_HLE = (_wide(side).repeat(group, 1).transpose(1, 0, 2) for side in (k_LKE, v_LKE))
    scores_HTL = q_HTE @ k_HLE.transpose(0, 2, 1) * spec.scale
    if spec.soft_cap is not None:
        scores_HTL = spec.soft_cap * np.tanh(scores_HTL / spec.soft_cap)
    distance_TL = np.arange(length - num_queries, length)[:, None] - np.arange(length)
    if spec.alibi_slopes is not None:
        scores_HTL = scores_HTL - np.array(spec.alibi_slopes)[:, None, None] * distance_TL
    hidden = distance_TL < 0
    if spec.window is not None:
        hidden = hidden | (distance_TL >= spec.window)
    scores_HTL = np.where(hidden, -np.inf, scores_HTL)
    weights = np.exp(scores_HTL - scores_HTL.max(-1, keepdims=True))
    attended = weights @ v_HLE / weights.sum(-1, keepdims=True)
    return _round(attended.transpose(1, 0, 2), q_THE)


def _wide(x: NumpyArray) -> NumpyArray:
    wide: NumpyArray = x.astype(np.float64)
    return wide


def _round(x: NumpyArray, like: NumpyArray) -> NumpyArray:
    rounded: NumpyArray = x.astype(like.dtype)
    return rounded


def _silu(x: NumpyArray) -> NumpyArray:
    half = 0.5 * x
    product: NumpyArray = half * (1 + np.tanh(half))
    return product


def _gelu_tanh(x: NumpyArray) -> NumpyArray:
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)
    approximate: NumpyArray = 0.5 * x * (1 + np.tanh(inner))
    return approximate
