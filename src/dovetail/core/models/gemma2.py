"""Gemma 2 (Gemma Team, 2024): soft caps, every other layer with a window, norms on both sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Tensor
from dovetail.core.contracts.ops import Ops
from dovetail.core.models.blocks import GATED_ACTIVATIONS, Rotate
from dovetail.core.models.decoder import Layer, RotaryDecoder, SandwichLayer
from dovetail.core.models.rotary import Rotary
from dovetail.core.models.separate import attention, layer_name, mlp
from dovetail.core.models.settings import Settings
from dovetail.core.models.sizes import Sizes, layer_windows
from dovetail.core.types import Array

__all__ = ["Gemma2"]

ARCHITECTURE = "Gemma2ForCausalLM"
NORM_OFFSET = 1.0
"""The checkpoint's norm weights are stored less one."""


class Gemma2(RotaryDecoder):
    """The embedding is scaled by the root of the hidden size, the logits are capped."""

    def __init__(
        self,
        *,
        sizes: Sizes,
        rotary: Rotary,
        layers: Sequence[Layer],
        tied: bool,
        final_cap: float | None,
    ) -> None:
        super().__init__(
            sizes=sizes, rotary=rotary, layers=layers, tied=tied, norm_offset=NORM_OFFSET
        )
        self.embed_scale = sizes.hidden**0.5
        self.final_cap = final_cap

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, max_model_len: int) -> Gemma2:
        """Read the config. Raises CheckpointError and UnsupportedError."""
        settings = Settings(config, ARCHITECTURE)
        settings.require("use_bidirectional_attention", only=False)
        sizes = Sizes.read(settings, max_model_len=max_model_len, head_dim=256)
        bias = settings.flag("attention_bias", False)
        activation = settings.choice("hidden_activation", GATED_ACTIVATIONS, "gelu_pytorch_tanh")

        def layer(spec: AttentionSpec) -> SandwichLayer:
            return SandwichLayer(
                input_norm=_norm(sizes, spec.layer, "input_layernorm"),
                attention=attention(sizes, spec, Rotate(), qkv_bias=bias, out_bias=bias),
                attention_norm=_norm(sizes, spec.layer, "post_attention_layernorm"),
                pre_mlp_norm=_norm(sizes, spec.layer, "pre_feedforward_layernorm"),
                mlp=mlp(sizes, spec.layer, activation),
                mlp_norm=_norm(sizes, spec.layer, "post_feedforward_layernorm"),
                eps=sizes.eps,
            )

        return cls(
            sizes=sizes,
            rotary=Rotary.from_config(settings, head_size=sizes.head, max_model_len=max_model_len),
            layers=[layer(spec) for spec in _specs(settings, sizes)],
            tied=settings.flag("tie_word_embeddings", True),
            final_cap=settings.optional_number("final_logit_softcapping", absent=30.0),
        )

    def embedded(self, ops: Ops, weights: Mapping[str, Any], token_ids_T: Array) -> Array:
        """The scaled embedding, (T, D)."""
        x_TD = super().embedded(ops, weights, token_ids_T)
        return ops.scale(x_TD, self.embed_scale)

    def logits(self, ops: Ops, weights: Mapping[str, Any], hidden_ND: Array) -> Array:
        """Capped logits of chosen rows, (N, V)."""
        logits = super().logits(ops, weights, hidden_ND)
        return logits if self.final_cap is None else ops.soft_cap(logits, self.final_cap)


def _specs(settings: Settings, sizes: Sizes) -> list[AttentionSpec]:
    window = settings.optional_integer("sliding_window", absent=4096)
    alternating = [index % 2 == 0 for index in range(sizes.layers)]
    windows = layer_windows(settings, alternating, window)
    scale = settings.number("query_pre_attn_scalar") ** -0.5
    cap = settings.optional_number("attn_logit_softcapping", absent=50.0)
    return [
        sizes.attention(index, window=window, scale=scale, soft_cap=cap)
        for index, window in enumerate(windows)
    ]


def _norm(sizes: Sizes, layer: int, name: str) -> Tensor:
    source = f"{layer_name(layer)}.{name}.weight"
    return Tensor(source=source, shape=(sizes.hidden,), offset=NORM_OFFSET)
