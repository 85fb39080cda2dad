"""Decoders with layer norms and learned positions: GPT-2 and OPT."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Constant, Linear, Model, StepInputs, Tensor, WeightTree
from dovetail.core.contracts.ops import Ops
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.blocks import Attention, Mlp, Step, Weights, head
from dovetail.core.types import Array

__all__ = [
    "LayerNorm",
    "LearnedDecoder",
    "LearnedLayer",
    "NormAfter",
    "NormBefore",
    "Projection",
    "Stage",
    "Unchanged",
    "layer_norm",
    "plain_layer_norm",
]


class Stage(Protocol):
    """A function from (T, D) to (T, D'), with its weights."""

    def weights(self) -> WeightTree:
        """Its parameters."""
        ...

    def __call__(self, ops: Ops, w: Weights, x_TD: Array) -> Array:
        """(T, D')."""
        ...


@dataclass(frozen=True)
class Unchanged:
    """Where a family has a stage that this checkpoint has not."""

    def weights(self) -> WeightTree:
        """None."""
        return {}

    def __call__(self, ops: Ops, w: Weights, x_TD: Array) -> Array:
        """As it is."""
        return x_TD


@dataclass(frozen=True)
class Projection:
    """A linear layer."""

    layer: Linear

    def weights(self) -> WeightTree:
        """Its weight."""
        return {"layer": self.layer}

    def __call__(self, ops: Ops, w: Weights, x_TD: Array) -> Array:
        """(T, out)."""
        return ops.linear(x_TD, w["layer"])


@dataclass(frozen=True, kw_only=True)
class LayerNorm:
    """A layer norm with weight and bias (D,)."""

    weight: Tensor | Constant
    bias: Tensor | Constant
    eps: float

    def weights(self) -> WeightTree:
        """Weight and bias."""
        return {"weight": self.weight, "bias": self.bias}

    def __call__(self, ops: Ops, w: Weights, x_TD: Array) -> Array:
        """(T, D)."""
        return ops.layer_norm(x_TD, w["weight"], w["bias"], self.eps)


class LearnedLayer(Protocol):
    """A whole layer."""

    @property
    def attention(self) -> Attention:
        """Its attention."""
        ...

    def weights(self) -> WeightTree:
        """Its parameters."""
        ...

    def __call__(
        self, ops: Ops, w: Weights, x_TD: Array, step: Step, cache: Array
    ) -> tuple[Array, Array]:
        """(T, D) and the cache."""
        ...


@dataclass(frozen=True, kw_only=True)
class NormBefore:
    """Each norm before the part that it belongs to."""

    attention_norm: LayerNorm
    attention: Attention
    mlp_norm: LayerNorm
    mlp: Mlp

    def weights(self) -> WeightTree:
        """Norms, attention and MLP."""
        return {
            "attention_norm": self.attention_norm.weights(),
            "attention": self.attention.weights(),
            "mlp_norm": self.mlp_norm.weights(),
            "mlp": self.mlp.weights(),
        }

    def __call__(
        self, ops: Ops, w: Weights, x_TD: Array, step: Step, cache: Array
    ) -> tuple[Array, Array]:
        """(T, D) and the cache."""
        normed = self.attention_norm(ops, w["attention_norm"], x_TD)
        attended, cache = self.attention(ops, w["attention"], normed, step, cache)
        x_TD = ops.add(x_TD, attended)
        fed = self.mlp(ops, w["mlp"], self.mlp_norm(ops, w["mlp_norm"], x_TD))
        return ops.add(x_TD, fed), cache


@dataclass(frozen=True, kw_only=True)
class NormAfter:
    """Each norm after the addition, as the first transformers had it (Vaswani et al., 2017)."""

    attention: Attention
    attention_norm: LayerNorm
    mlp: Mlp
    mlp_norm: LayerNorm

    def weights(self) -> WeightTree:
        """Attention, MLP and norms."""
        return {
            "attention": self.attention.weights(),
            "attention_norm": self.attention_norm.weights(),
            "mlp": self.mlp.weights(),
            "mlp_norm": self.mlp_norm.weights(),
        }

    def __call__(
        self, ops: Ops, w: Weights, x_TD: Array, step: Step, cache: Array
    ) -> tuple[Array, Array]:
        """(T, D) and the cache."""
        attended, cache = self.attention(ops, w["attention"], x_TD, step, cache)
        x_TD = self.attention_norm(ops, w["attention_norm"], ops.add(x_TD, attended))
        fed = self.mlp(ops, w["mlp"], x_TD)
        return self.mlp_norm(ops, w["mlp_norm"], ops.add(x_TD, fed)), cache


class LearnedDecoder(Model):
    """Two embeddings added up, layers, a norm, the output layer.

    Args:
        embed: Tokens, (V, D').
        position_embed: Positions, with as many rows as there are positions or more.
        max_positions: The longest sequence that ``position_embed`` has rows for.
        max_model_len: The longest sequence that will come.
        stage_in: From the embedding's width to the layers'.
        layers: In order.
        final_norm: After the last layer.
        stage_out: From the layers' width to the embedding's.
        tied: The output layer is the embedding.

    Raises:
        UnsupportedError: ``max_model_len`` is longer than there are positions.
    """

    ignored = (*Model.ignored, r"lm_head\.weight")

    def __init__(
        self,
        *,
        embed: Tensor,
        position_embed: Tensor,
        max_positions: int,
        max_model_len: int,
        layers: Sequence[LearnedLayer],
        final_norm: Stage,
        tied: bool,
        stage_in: Stage = Unchanged(),
        stage_out: Stage = Unchanged(),
    ) -> None:
        if max_model_len > max_positions:
            raise UnsupportedError(
                f"max_model_len {max_model_len} is more than the {max_positions} positions that "
                f"the model has learned; use at most --max-model-len {max_positions}."
            )
        self.vocab_size = embed.shape[0]
        self.max_positions = max_positions
        self.embed = embed
        self.position_embed = position_embed
        self.stage_in = stage_in
        self.layers = tuple(layers)
        self.final_norm = final_norm
        self.stage_out = stage_out
        self.lm_head = head(embed, tied=tied)

    def weights(self) -> WeightTree:
        """Declaration of every parameter."""
        return {
            "embed": self.embed,
            "position_embed": self.position_embed,
            "stage_in": self.stage_in.weights(),
            "layers": [layer.weights() for layer in self.layers],
            "final_norm": self.final_norm.weights(),
            "stage_out": self.stage_out.weights(),
            "lm_head": self.lm_head,
        }

    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """One per layer, in order."""
        return tuple(layer.attention.spec for layer in self.layers)

    def forward(
        self, ops: Ops, weights: Mapping[str, Any], inputs: StepInputs, caches: Sequence[Array]
    ) -> tuple[Array, list[Array]]:
        """Hidden states after the last norm, (T, D'), and the caches."""
        step = Step(plan=inputs.plan)
        tokens = ops.embedding(inputs.token_ids_T, weights["embed"])
        positions = ops.embedding(inputs.positions_T, weights["position_embed"])
        x = ops.add(self.stage_in(ops, weights["stage_in"], tokens), positions)
        written: list[Array] = []
        for layer, w, cache in zip(self.layers, weights["layers"], caches, strict=True):
            x, cache = layer(ops, w, x, step, cache)
            written.append(cache)
        x = self.final_norm(ops, weights["final_norm"], x)
        return self.stage_out(ops, weights["stage_out"], x), written

    def logits(self, ops: Ops, weights: Mapping[str, Any], hidden_ND: Array) -> Array:
        """Logits of chosen rows, (N, V)."""
        return ops.linear(hidden_ND, weights["lm_head"])


def layer_norm(module: str, width: int, eps: float) -> LayerNorm:
    """The layer norm that the checkpoint has under this name."""
    return LayerNorm(
        weight=Tensor(source=f"{module}.weight", shape=(width,)),
        bias=Tensor(source=f"{module}.bias", shape=(width,)),
        eps=eps,
    )


def plain_layer_norm(width: int, eps: float) -> LayerNorm:
    """A layer norm without parameters."""
    return LayerNorm(
        weight=Constant(make=lambda: np.ones(width, np.float32)),
        bias=Constant(make=lambda: np.zeros(width, np.float32)),
        eps=eps,
    )
