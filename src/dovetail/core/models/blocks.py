"""The parts that decoders are made of. A part declares its weights and is a function over the ops.

Every part is frozen data; ``w`` is what the runner made of the part's own ``weights()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Linear, Tensor, WeightTree
from dovetail.core.contracts.ops import Ops
from dovetail.core.types import Array

__all__ = [
    "ACTIVATIONS",
    "GATED_ACTIVATIONS",
    "Attention",
    "GatedMlp",
    "HeadPositions",
    "Mlp",
    "NormAndRotate",
    "Rotate",
    "Step",
    "Unrotated",
    "head",
    "linear",
]

Weights = Mapping[str, Any]

ACTIVATIONS: Mapping[str, str] = {
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Names in configs, and the op that computes them."""

GATED_ACTIVATIONS: Mapping[str, str] = {
    "silu": "silu_and_mul",
    "swish": "silu_and_mul",
    "gelu_new": "gelu_tanh_and_mul",
    "gelu_pytorch_tanh": "gelu_tanh_and_mul",
}
"""The same for an MLP with a gate."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """What all layers of a step share."""

    plan: object
    """The attention backend's metadata."""
    angles: tuple[Array, ...] = ()
    """Cosines and sines of the step's positions, (T, F) each, where the model rotates."""


class HeadPositions(Protocol):
    """What happens to queries and keys between the projection and the attention."""

    def weights(self) -> WeightTree:
        """Its parameters."""
        ...

    def __call__(
        self, ops: Ops, w: Weights, q_THE: Array, k_TKE: Array, step: Step
    ) -> tuple[Array, Array]:
        """Queries and keys, of the same shapes."""
        ...


@dataclass(frozen=True)
class Unrotated:
    """Nothing: the positions are in the embedding."""

    def weights(self) -> WeightTree:
        """None."""
        return {}

    def __call__(
        self, ops: Ops, w: Weights, q_THE: Array, k_TKE: Array, step: Step
    ) -> tuple[Array, Array]:
        """Both as they are."""
        return q_THE, k_TKE


@dataclass(frozen=True)
class Rotate:
    """Rotary positions."""

    def weights(self) -> WeightTree:
        """None of its own: the tables are the model's."""
        return {}

    def __call__(
        self, ops: Ops, w: Weights, q_THE: Array, k_TKE: Array, step: Step
    ) -> tuple[Array, Array]:
        """Both rotated by the step's angles."""
        return ops.rotary(q_THE, *step.angles), ops.rotary(k_TKE, *step.angles)


@dataclass(frozen=True, kw_only=True)
class NormAndRotate:
    """A norm over each head, then rotary positions."""

    q_norm: Tensor
    k_norm: Tensor
    eps: float

    def weights(self) -> WeightTree:
        """Two norm weights, (E,) each."""
        return {"q_norm": self.q_norm, "k_norm": self.k_norm}

    def __call__(
        self, ops: Ops, w: Weights, q_THE: Array, k_TKE: Array, step: Step
    ) -> tuple[Array, Array]:
        """Both normed and rotated."""
        q_THE = ops.rms_norm(q_THE, w["q_norm"], self.eps)
        k_TKE = ops.rms_norm(k_TKE, w["k_norm"], self.eps)
        return ops.rotary(q_THE, *step.angles), ops.rotary(k_TKE, *step.angles)


@dataclass(frozen=True, kw_only=True)
class Attention:
    """Causal attention with grouped heads (Ainslie et al., 2023) and its projections."""

    spec: AttentionSpec
    qkv: Linear
    out: Linear
    positions: HeadPositions

    def weights(self) -> WeightTree:
        """Projections, and those of ``positions``."""
        return {"qkv": self.qkv, "out": self.out, "positions": self.positions.weights()}

    def __call__(
        self, ops: Ops, w: Weights, x_TD: Array, step: Step, cache: Array
    ) -> tuple[Array, Array]:
        """The attended values, (T, D), and the cache."""
        q, k, v = self._heads(ops.linear(x_TD, w["qkv"]))
        q, k = self.positions(ops, w["positions"], q, k, step)
        attended, cache = ops.attention(q, k, v, cache, step.plan, self.spec)
        joined = attended.reshape(attended.shape[0], -1)
        return ops.all_reduce(ops.linear(joined, w["out"])), cache

    def _heads(self, qkv: Array) -> tuple[Array, Array, Array]:
        """Queries, keys and values. Heads are counted by width: a device may hold a share."""
        heads = qkv.reshape(qkv.shape[0], -1, self.spec.head_size)
        group = self.spec.num_heads // self.spec.num_kv_heads
        num_kv = heads.shape[1] // (group + 2)
        num_q = group * num_kv
        return heads[:, :num_q], heads[:, num_q : num_q + num_kv], heads[:, num_q + num_kv :]


@dataclass(frozen=True, kw_only=True)
class GatedMlp:
    """``down(act(gate(x)) * up(x))`` (Shazeer, 2020)."""

    gate_up: Linear
    down: Linear
    activation: str
    """The op that takes gate and up side by side."""

    def weights(self) -> WeightTree:
        """Two projections."""
        return {"gate_up": self.gate_up, "down": self.down}

    def __call__(self, ops: Ops, w: Weights, x_TD: Array) -> Array:
        """(T, D)."""
        act = getattr(ops, self.activation)
        return ops.all_reduce(ops.linear(act(ops.linear(x_TD, w["gate_up"])), w["down"]))


@dataclass(frozen=True, kw_only=True)
class Mlp:
    """``down(act(up(x)))``."""

    up: Linear
    down: Linear
    activation: str
    """The op between the two."""

    def weights(self) -> WeightTree:
        """Two projections."""
        return {"up": self.up, "down": self.down}

    def __call__(self, ops: Ops, w: Weights, x_TD: Array) -> Array:
        """(T, D)."""
        act = getattr(ops, self.activation)
        return ops.all_reduce(ops.linear(act(ops.linear(x_TD, w["up"])), w["down"]))


def linear(
    modules: Mapping[str, int],
    in_features: int,
    *,
    split: Literal["out", "in"] | None,
    bias: bool = False,
) -> Linear:
    """One linear layer made of several modules of the checkpoint: name to output rows, in order."""
    return Linear(
        sources=tuple(f"{module}.weight" for module in modules),
        bias_sources=tuple(f"{module}.bias" for module in modules) if bias else (),
        out_features=tuple(modules.values()),
        in_features=in_features,
        split=split,
    )


def head(embed: Tensor, *, tied: bool) -> Linear:
    """The output layer: ``lm_head.weight``, or the embedding's table, at ``embed`` in the tree."""
    vocab, width = embed.shape
    return Linear(
        sources=(embed.source if tied else "lm_head.weight",),
        out_features=(vocab,),
        in_features=width,
        tied_to="embed" if tied else None,
    )
