"""The parts that decoders are made of. A part declares its weights and is a function over the ops.

Every part is frozen data; ``w`` is what the runner made of the part's own ``weights()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Linear, Tensor, WeightTree
from dovetail.core.contracts.ops import HeadNorms, Ops
from dovetail.core.types import Array

__all__ = [
    "ACTIVATIONS",
    "GATED_ACTIVATIONS",
    "Attention",
    "GatedMlp",
    "Attended",
    "HeadPositions",
    "Heads",
    "Mlp",
    "NormAndRotate",
    "Rotate",
    "Step",
    "Unrotated",
    "head",
    "linear",
]

Weights = Mapping[str, Any]
Attended: TypeAlias = tuple[Array, Array]
"""What was attended, (T, H, E), and the cache."""

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
    wanted: Array | None = None
    """(W,) indices of the tokens that are computed beyond this attention; None: all."""

    def narrowed(self, ops: Ops, x_TD: Array) -> Array:
        """The wanted rows, (W, D), or all."""
        return x_TD if self.wanted is None else ops.embedding(self.wanted, x_TD)


@dataclass(frozen=True)
class Heads:
    """One layer's projections, before anything was done to them."""

    q_THE: Array
    k_TKE: Array
    v_TKE: Array
    spec: AttentionSpec


class HeadPositions(Protocol):
    """How positions come into the attention: what happens to queries and keys before it."""

    def weights(self) -> WeightTree:
        """Its parameters."""
        ...

    def attend(self, ops: Ops, w: Weights, heads: Heads, step: Step, cache: Array) -> Attended:
        """Attended values, (T, H, E), and the cache."""
        ...


@dataclass(frozen=True)
class Unrotated:
    """Nothing: the positions are in the embedding."""

    def weights(self) -> WeightTree:
        """None."""
        return {}

    def attend(self, ops: Ops, w: Weights, heads: Heads, step: Step, cache: Array) -> Attended:
        """With queries and keys as they are."""
        return ops.attention(heads.q_THE, heads.k_TKE, heads.v_TKE, cache, step.plan, heads.spec)


@dataclass(frozen=True)
class Rotate:
    """Rotary positions."""

    def weights(self) -> WeightTree:
        """None of its own: the tables are the model's."""
        return {}

    def attend(self, ops: Ops, w: Weights, heads: Heads, step: Step, cache: Array) -> Attended:
        """With both rotated by the step's angles."""
        return _rotated(ops, heads, None, step, cache)


@dataclass(frozen=True, kw_only=True)
class NormAndRotate:
    """A norm over each head, then rotary positions."""

    q_norm: Tensor
    k_norm: Tensor
    eps: float

    def weights(self) -> WeightTree:
        """Two norm weights, (E,) each."""
        return {"q_norm": self.q_norm, "k_norm": self.k_norm}

    def attend(self, ops: Ops, w: Weights, heads: Heads, step: Step, cache: Array) -> Attended:
        """With both normed and rotated."""
        return _rotated(ops, heads, (w["q_norm"], w["k_norm"], self.eps), step, cache)


def _rotated(ops: Ops, heads: Heads, norms: HeadNorms | None, step: Step, cache: Array) -> Attended:
    return ops.rotary_attention(
        heads.q_THE, heads.k_TKE, heads.v_TKE, step.angles, norms, cache, step.plan, heads.spec
    )


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
        """The attended values, (T, D) or of the wanted tokens, and the cache."""
        heads = self._heads(ops.linear(x_TD, w["qkv"]))
        attended, cache = self.positions.attend(ops, w["positions"], heads, step, cache)
        joined = step.narrowed(ops, attended.reshape(attended.shape[0], -1))
        return ops.all_reduce(ops.linear(joined, w["out"])), cache

    def _heads(self, qkv: Array) -> Heads:
        """Heads are counted by width: a device may hold a share."""
        heads = qkv.reshape(qkv.shape[0], -1, self.spec.head_size)
        group = self.spec.num_heads // self.spec.num_kv_heads
        num_kv = heads.shape[1] // (group + 2)
        num_q = group * num_kv
        q, k, v = heads[:, :num_q], heads[:, num_q : num_q + num_kv], heads[:, num_q + num_kv :]
        return Heads(q, k, v, self.spec)


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
        gated = ops.gated_linear(x_TD, w["gate_up"], self.activation)
        return ops.all_reduce(ops.linear(gated, w["down"]))


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
