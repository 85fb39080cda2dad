"""Mistral 7B and those built like it: Llama with a sliding window (Jiang et al., 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.core.models.blocks import GATED_ACTIVATIONS, Rotate
from dovetail.core.models.decoder import PreNormLayer, RotaryDecoder
from dovetail.core.models.rotary import Rotary
from dovetail.core.models.separate import attention, mlp, pre_norm_layer
from dovetail.core.models.settings import Settings
from dovetail.core.models.sizes import Sizes

__all__ = ["Mistral"]

ARCHITECTURE = "MistralForCausalLM"


class Mistral(RotaryDecoder):
    """One window for every layer, or none."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, max_model_len: int) -> Mistral:
        """Read the config. Raises CheckpointError and UnsupportedError."""
        settings = Settings(config, ARCHITECTURE)
        sizes = Sizes.read(settings, max_model_len=max_model_len)
        activation = settings.choice("hidden_act", GATED_ACTIVATIONS, "silu")
        window = settings.optional_integer("sliding_window", absent=4096)

        def layer(index: int) -> PreNormLayer:
            attend = attention(sizes, sizes.attention(index, window=window), Rotate())
            return pre_norm_layer(sizes, attend, mlp(sizes, index, activation))

        return cls(
            sizes=sizes,
            rotary=Rotary.from_config(settings, head_size=sizes.head, max_model_len=max_model_len),
            layers=[layer(index) for index in range(sizes.layers)],
            tied=settings.flag("tie_word_embeddings", False),
        )
