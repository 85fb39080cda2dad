"""Decoders with root-mean-square norms and rotary positions: Llama and its many relatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Linear, Model, StepInputs, Tensor, WeightTree
from dovetail.core.contracts.ops import Ops
from dovetail.core.models.blocks import Attention, GatedMlp, Step, Weights, head
from dovetail.core.models.rotary import Rotary
from dovetail.core.models.sizes import Sizes
from dovetail.core.types import Array

__all__ = ["Layer", "PreNormLayer", "RotaryDecoder", "SandwichLayer"]


class Layer(Protocol):
    """A layer, without its first norm and its last addition.

    The decoder does those two together in one op: it adds what the layer before returned to the
    residual and norms the sum for this layer.
    """

    @property
    def attention(self) -> Attention:
        """Its attention."""
        ...

    def weights(self) -> WeightTree:
        """Its parameters; among them ``input_norm``, which the decoder applies."""
        ...

    def __call__(
        self, ops: Ops, w: Weights, normed_TD: Array, residual_TD: Array, step: Step, cache: Array
    ) -> tuple[Array, Array, Array]:
        """What is to be added to the residual, the residual, and the cache."""
        ...


@dataclass(frozen=True, kw_only=True)
class PreNormLayer:
    """A norm before the attention and one before the MLP."""

    input_norm: Tensor
    attention: Attention
    post_norm: Tensor
    mlp: GatedMlp
    eps: float

    def weights(self) -> WeightTree:
        """Two norms, attention, MLP."""
        return {
            "input_norm": self.input_norm,
            "attention": self.attention.weights(),
            "post_norm": self.post_norm,
            "mlp": self.mlp.weights(),
        }

    def __call__(
        self, ops: Ops, w: Weights, normed_TD: Array, residual_TD: Array, step: Step, cache: Array
    ) -> tuple[Array, Array, Array]:
        """See ``Layer``."""
        attended, cache = self.attention(ops, w["attention"], normed_TD, step, cache)
        residual_TD = step.narrowed(ops, residual_TD)
        normed, residual = ops.add_rms_norm(attended, residual_TD, w["post_norm"], self.eps)
        return self.mlp(ops, w["mlp"], normed), residual, cache


@dataclass(frozen=True, kw_only=True)
class SandwichLayer:
    """A norm before and one after both the attention and the MLP."""

    input_norm: Tensor
    attention: Attention
    attention_norm: Tensor
    """After the attention."""
    pre_mlp_norm: Tensor
    mlp: GatedMlp
    mlp_norm: Tensor
    """After the MLP."""
    eps: float

    def weights(self) -> WeightTree:
        """Four norms, attention, MLP."""
        return {
            "input_norm": self.input_norm,
            "attention": self.attention.weights(),
            "attention_norm": self.attention_norm,
            "pre_mlp_norm": self.pre_mlp_norm,
            "mlp": self.mlp.weights(),
            "mlp_norm": self.mlp_norm,
        }

    def __call__(
        self, ops: Ops, w: Weights, normed_TD: Array, residual_TD: Array, step: Step, cache: Array
    ) -> tuple[Array, Array, Array]:
        """See ``Layer``."""
        attended, cache = self.attention(ops, w["attention"], normed_TD, step, cache)
        residual_TD = step.narrowed(ops, residual_TD)
        attended = ops.rms_norm(attended, w["attention_norm"], self.eps)
        normed, residual = ops.add_rms_norm(attended, residual_TD, w["pre_mlp_norm"], self.eps)
        fed = self.mlp(ops, w["mlp"], normed)
        return ops.rms_norm(fed, w["mlp_norm"], self.eps), residual, cache


class RotaryDecoder(Model):
    """Embedding, layers, norm, output layer. Families differ in their layers.

    Args:
        sizes: Widths and counts.
        rotary: Position tables.
        layers: In order; at least one.
        tied: The output layer is the embedding.
        norm_offset: What the checkpoint's norm weights lack (``Tensor.offset``).
    """

    ignored = (*Model.ignored, r"lm_head\.weight")
    narrows = True

    def __init__(
        self,
        *,
        sizes: Sizes,
        rotary: Rotary,
        layers: Sequence[Layer],
        tied: bool,
        norm_offset: float = 0.0,
    ) -> None:
        self.vocab_size = sizes.vocab
        self.max_positions = sizes.positions
        self.layers = tuple(layers)
        self.rotary = rotary
        self.eps = sizes.eps
        self.embed = Tensor(source="model.embed_tokens.weight", shape=(sizes.vocab, sizes.hidden))
        self.norm = Tensor(source="model.norm.weight", shape=(sizes.hidden,), offset=norm_offset)
        self.lm_head: Linear = head(self.embed, tied=tied)

    def weights(self) -> WeightTree:
        """Declaration of every parameter."""
        return {
            "embed": self.embed,
            "rotary": self.rotary.weights(),
            "layers": [layer.weights() for layer in self.layers],
            "norm": self.norm,
            "lm_head": self.lm_head,
        }

    def attention_specs(self) -> tuple[AttentionSpec, ...]:
        """One per layer, in order."""
        return tuple(layer.attention.spec for layer in self.layers)

    def forward(
        self, ops: Ops, weights: Mapping[str, Any], inputs: StepInputs, caches: Sequence[Array]
    ) -> tuple[Array, list[Array]]:
        """Hidden states after the last norm, (T, D) or of the wanted tokens, and the caches."""
        angles = self.rotary.look_up(ops, weights["rotary"], inputs.positions_T)
        step = Step(plan=inputs.plan, angles=angles)
        # Later layers look at all tokens; behind the last attention only some matter.
        steps = [step] * (len(self.layers) - 1) + [replace(step, wanted=inputs.wanted)]
        residual = self.embedded(ops, weights, inputs.token_ids_T)
        first, *others = (w["input_norm"] for w in weights["layers"])
        normed = ops.rms_norm(residual, first, self.eps)
        norms = [*others, weights["norm"]]
        parts = zip(self.layers, weights["layers"], caches, steps, norms, strict=True)
        written: list[Array] = []
        for layer, w, cache, step, next_norm in parts:
            added, residual, cache = layer(ops, w, normed, residual, step, cache)
            normed, residual = ops.add_rms_norm(added, residual, next_norm, self.eps)
            written.append(cache)
        return normed, written

    def logits(self, ops: Ops, weights: Mapping[str, Any], hidden_ND: Array) -> Array:
        """Logits of chosen rows, (N, V)."""
        return ops.linear(hidden_ND, weights["lm_head"])

    def embedded(self, ops: Ops, weights: Mapping[str, Any], token_ids_T: Array) -> Array:
        """What the first layer starts from, (T, D)."""
        return ops.embedding(token_ids_T, weights["embed"])
