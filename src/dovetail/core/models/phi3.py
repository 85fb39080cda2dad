"""Phi-3 and Phi-4 mini (Abdin et al., 2024): q, k, v in one tensor, gate and up in another."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.core.contracts.model import Linear
from dovetail.core.models.blocks import GATED_ACTIVATIONS, Attention, GatedMlp, Rotate, linear
from dovetail.core.models.decoder import PreNormLayer, RotaryDecoder
from dovetail.core.models.rotary import Rotary
from dovetail.core.models.separate import layer_name, pre_norm_layer
from dovetail.core.models.settings import Settings
from dovetail.core.models.sizes import Sizes

__all__ = ["Phi3"]

ARCHITECTURE = "Phi3ForCausalLM"


class Phi3(RotaryDecoder):
    """One window for every layer, or none; part of each head may turn; LongRoPE."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, max_model_len: int) -> Phi3:
        """Read the config. Raises CheckpointError and UnsupportedError."""
        settings = Settings(config, ARCHITECTURE)
        sizes = Sizes.read(settings, max_model_len=max_model_len, eps=1e-5)
        activation = settings.choice("hidden_act", GATED_ACTIVATIONS, "silu")
        window = settings.optional_integer("sliding_window")

        def layer(index: int) -> PreNormLayer:
            attend = _attention(sizes, index, window)
            return pre_norm_layer(sizes, attend, _mlp(sizes, index, activation))

        return cls(
            sizes=sizes,
            rotary=Rotary.from_config(settings, head_size=sizes.head, max_model_len=max_model_len),
            layers=[layer(index) for index in range(sizes.layers)],
            tied=settings.flag("tie_word_embeddings", False),
        )


def _attention(sizes: Sizes, layer: int, window: int | None) -> Attention:
    at = f"{layer_name(layer)}.self_attn"
    return Attention(
        spec=sizes.attention(layer, window=window),
        qkv=Linear(
            sources=(f"{at}.qkv_proj.weight",),
            out_features=(sizes.q, sizes.kv, sizes.kv),
            in_features=sizes.hidden,
            split="out",
        ),
        out=linear({f"{at}.o_proj": sizes.hidden}, sizes.q, split="in"),
        positions=Rotate(),
    )


def _mlp(sizes: Sizes, layer: int, activation: str) -> GatedMlp:
    at = f"{layer_name(layer)}.mlp"
    return GatedMlp(
        gate_up=Linear(
            sources=(f"{at}.gate_up_proj.weight",),
            out_features=(sizes.intermediate, sizes.intermediate),
            in_features=sizes.hidden,
            split="out",
        ),
        down=linear({f"{at}.down_proj": sizes.hidden}, sizes.intermediate, split="in"),
        activation=activation,
    )
