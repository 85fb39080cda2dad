"""The op table: the one thing that model definitions and samplers call.

Each op has a reference per array family (``platforms/torch/ops.py`` for torch). A platform
overrides an op by name; the override keeps the signature below and is compared with the reference
by one parametrised test. Ops are looked up once at load, never per call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Protocol, TypeAlias

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.errors import PluginError
from dovetail.core.types import Array

__all__ = ["INT4_GROUP", "OP_NAMES", "HeadNorms", "Op", "OpTable", "Ops"]

INT4_GROUP = 64
"""Inputs that share a scale in the weights of ``int4_linear``."""

HeadNorms: TypeAlias = tuple[Array, Array, float]
"""Norm weights (E,) of query heads and of key heads, and the epsilon of both."""


class Ops(Protocol):
    """The ops that models call. Arrays are the platform's; nothing is changed in place."""

    def embedding(self, ids_T: Array, table_VD: Array) -> Array:
        """Rows of a table: (T, D)."""

    def linear(self, x: Array, weight: Array) -> Array:
        """``x @ W.T + b``; ``weight`` is what the platform bound W (out, in) and b (out,) to."""

    def int8_weight(self, codes: Array, scales: Array, bias: Array | None) -> Array:
        """What ``int8_linear`` is given: the platform may pack it. Called once per layer, at load.

        Args:
            codes: (out, in) int8, -127..127.
            scales: (out,) float32.
            bias: (out,) in the dtype of the activations.
        """

    def int8_linear(self, x: Array, weight: Array) -> Array:
        """``x @ (codes * scales[:, None]).T + bias``, with x in 8 bits, a step for each token.

        For each row of x, in float32: ``step = max|x| / 127``, or 1 where that is below 2**-126;
        ``q = round(x / step)``, halves to the even one. The result is ``(q @ codes.T) * step *
        scales + bias``: the sum over the inputs is exact, scaled and biased in float32, and rounded
        to the dtype of x once. A row that holds NaN or an infinity gives NaN, and so does no other.
        Steps of single tokens are from Yao et al., "ZeroQuant" (2022), section 3.
        """

    def int4_weight(self, codes: Array, scales: Array, bias: Array | None) -> Array:
        """What ``int4_linear`` is given: the platform may pack it. Called once per layer, at load.

        Args:
            codes: (out, in / 2) uint8: byte j holds input 2j in its low four bits and 2j + 1 in its
                high ones, each a value of -8..7 plus 8.
            scales: (out, in / ``INT4_GROUP``) float32, of each group of inputs, of either sign.
            bias: (out,) in the dtype of the activations.
        """

    def int4_linear(self, x: Array, weight: Array) -> Array:
        """``int8_linear`` for weights in 4 bits: x becomes q and steps as there.

        The sum over a group's inputs is exact. In float32 it is multiplied by the group's scale,
        the groups are added up, and the total is multiplied by the step and biased; then it is
        rounded to the dtype of x once.
        """

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """Root-mean-square norm over the last axis in float32 (Zhang and Sennrich, 2019)."""

    def add_rms_norm(
        self, x: Array, residual: Array, weight: Array, eps: float
    ) -> tuple[Array, Array]:
        """``s = x + residual``; returns (rms_norm(s), s)."""

    def add(self, x: Array, y: Array) -> Array:
        """``x + y``, of one shape and dtype."""

    def scale(self, x: Array, factor: float) -> Array:
        """``x * factor``, with the factor rounded to x's dtype first."""

    def layer_norm(self, x: Array, weight: Array, bias: Array | None, eps: float) -> Array:
        """Layer norm over the last axis (Ba et al., 2016)."""

    def rotary(self, x_THE: Array, cos_TF: Array, sin_TF: Array) -> Array:
        """Rotate the first 2F entries of each head as pairs (i, i + F) (Su et al., 2021)."""

    def silu_and_mul(self, gate_up: Array) -> Array:
        """``silu(a) * b`` for the halves a, b of the last axis."""

    def gelu_tanh_and_mul(self, gate_up: Array) -> Array:
        """``gelu(a) * b`` with the tanh approximation."""

    def gelu(self, x: Array) -> Array:
        """The exact, erf-based gelu."""

    def gelu_tanh(self, x: Array) -> Array:
        """gelu with the tanh approximation."""

    def relu(self, x: Array) -> Array:
        """``max(x, 0)``."""

    def silu(self, x: Array) -> Array:
        """``x * sigmoid(x)``."""

    def soft_cap(self, x: Array, cap: float) -> Array:
        """``cap * tanh(x / cap)``."""

    def attention(
        self,
        q_THE: Array,
        k_TKE: Array,
        v_TKE: Array,
        cache: Array,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Array, Array]:
        """Write to the KV cache and attend; the runner binds this to the chosen backend."""

    def rotary_attention(
        self,
        q_THE: Array,
        k_TKE: Array,
        v_TKE: Array,
        angles: tuple[Array, ...],
        norms: HeadNorms | None,
        cache: Array,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Array, Array]:
        """Norm query and key heads if there are norms, rotate both, then attend.

        Derived from the other ops, unless the attention backend has its own
        (``RotaryAttention``). ``angles`` are cosines and sines, (T, F) each.
        """

    def gated_linear(self, x: Array, weight: Array, activation: str) -> Array:
        """``activation`` is an op that takes the halves of the last axis, such as silu_and_mul.

        Derived from it and ``linear``. A platform's own may leave out the rounding between them.
        """

    def all_reduce(self, x: Array) -> Array:
        """Sum over the devices that share a layer; the identity on one device."""


def _rotary_attention(
    ops: Ops,
    q: Array,
    k: Array,
    v: Array,
    angles: tuple[Array, ...],
    norms: HeadNorms | None,
    cache: Array,
    plan: object,
    spec: AttentionSpec,
) -> tuple[Array, Array]:
    if norms is not None:
        q_weight, k_weight, eps = norms
        q, k = ops.rms_norm(q, q_weight, eps), ops.rms_norm(k, k_weight, eps)
    q, k = ops.rotary(q, *angles), ops.rotary(k, *angles)
    return ops.attention(q, k, v, cache, plan, spec)


def _gated_linear(ops: Ops, x: Array, weight: Array, activation: str) -> Array:
    return getattr(ops, activation)(ops.linear(x, weight))


_DERIVED: Mapping[str, Callable[..., Any]] = {
    "rotary_attention": _rotary_attention,
    "gated_linear": _gated_linear,
}
"""Ops that are made of others: functions of the bound table and their own arguments."""

OP_NAMES: tuple[str, ...] = tuple(
    name
    for name in vars(Ops)
    if not name.startswith("_") and callable(getattr(Ops, name)) and name not in _DERIVED
)
"""Ops that every family of arrays has a reference for."""


@dataclass(frozen=True, kw_only=True)
class Op:
    """One implementation of an op."""

    function: Callable[..., Any]
    origin: str
    """Package and version, for the report: ``dovetail-cpu 0.1.0``."""
    tolerance: Mapping[str, float]
    """Largest absolute difference from the reference allowed, by dtype, for inputs near 1."""


class OpTable:
    """References by name, and the overrides of one platform. Complete before the model is built."""

    def __init__(self, references: Mapping[str, Callable[..., Any]]) -> None:
        self.references = dict(references)
        self.overrides: dict[str, Op] = {}

    def override(
        self,
        name: str,
        function: Callable[..., Any],
        *,
        origin: str,
        tolerance: Mapping[str, float] | None = None,
    ) -> None:
        """Use ``function`` for ``name``. Raises PluginError for a name that is not in the table."""
        if name not in self.references and name not in _DERIVED:
            known = ", ".join(sorted([*self.references, *_DERIVED]))
            raise PluginError(
                f"{origin} overrides the op {name!r}, which does not exist; ops: {known}."
            )
        self.overrides[name] = Op(
            function=function,
            origin=origin,
            tolerance=tolerance or {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3},
        )

    def bind(self) -> Any:
        """A namespace with one attribute per op: the override where there is one."""
        bound: Any = SimpleNamespace(**self.references)
        for name, function in _DERIVED.items():
            setattr(bound, name, partial(function, bound))
        for name, op in self.overrides.items():
            setattr(bound, name, op.function)
        return bound
