"""Llama 1, 2 and 3 (Touvron et al., 2023; Grattafiori et al., 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.core.models.blocks import GATED_ACTIVATIONS, Rotate
from dovetail.core.models.decoder import PreNormLayer, RotaryDecoder
from dovetail.core.models.rotary import Rotary
from dovetail.core.models.separate import attention, mlp, pre_norm_layer
from dovetail.core.models.settings import Settings
from dovetail.core.models.sizes import Sizes

__all__ = ["Llama"]

ARCHITECTURE = "LlamaForCausalLM"


class Llama(RotaryDecoder):
    """Grouped-query attention, gated MLP, biases where the config says so."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, max_model_len: int) -> Llama:
        """Read the config. Raises CheckpointError and UnsupportedError."""
        settings = Settings(config, ARCHITECTURE)
        sizes = Sizes.read(settings, max_model_len=max_model_len)
        attention_bias = settings.flag("attention_bias", False)
        mlp_bias = settings.flag("mlp_bias", False)
        activation = settings.choice("hidden_act", GATED_ACTIVATIONS, "silu")

        def layer(index: int) -> PreNormLayer:
            spec = sizes.attention(index)
            attend = attention(
                sizes, spec, Rotate(), qkv_bias=attention_bias, out_bias=attention_bias
            )
            return pre_norm_layer(sizes, attend, mlp(sizes, index, activation, bias=mlp_bias))

        return cls(
            sizes=sizes,
            rotary=Rotary.from_config(settings, head_size=sizes.head, max_model_len=max_model_len),
            layers=[layer(index) for index in range(sizes.layers)],
            tied=settings.flag("tie_word_embeddings", False),
        )
