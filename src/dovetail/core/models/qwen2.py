"""Qwen 1.5, 2 and 2.5 (Yang et al., 2024): biases on q, k, v; windows from some layer on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.core.models.blocks import GATED_ACTIVATIONS, Rotate
from dovetail.core.models.decoder import PreNormLayer, RotaryDecoder
from dovetail.core.models.rotary import Rotary
from dovetail.core.models.separate import attention, mlp, pre_norm_layer
from dovetail.core.models.settings import Settings
from dovetail.core.models.sizes import Sizes, layer_windows

__all__ = ["Qwen2", "qwen_windows"]

ARCHITECTURE = "Qwen2ForCausalLM"


class Qwen2(RotaryDecoder):
    """Llama with biases on q, k, v."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, max_model_len: int) -> Qwen2:
        """Read the config. Raises CheckpointError and UnsupportedError."""
        settings = Settings(config, ARCHITECTURE)
        sizes = Sizes.read(settings, max_model_len=max_model_len)
        activation = settings.choice("hidden_act", GATED_ACTIVATIONS, "silu")

        def layer(index: int, window: int | None) -> PreNormLayer:
            spec = sizes.attention(index, window=window)
            attend = attention(sizes, spec, Rotate(), qkv_bias=True)
            return pre_norm_layer(sizes, attend, mlp(sizes, index, activation))

        return cls(
            sizes=sizes,
            rotary=Rotary.from_config(settings, head_size=sizes.head, max_model_len=max_model_len),
            layers=[layer(*each) for each in enumerate(qwen_windows(settings, sizes.layers))],
            tied=settings.flag("tie_word_embeddings", False),
        )


def qwen_windows(settings: Settings, num_layers: int) -> list[int | None]:
    """The window of each layer: those from ``max_window_layers`` on, unless there are layer types.

    Without ``use_sliding_window`` no layer has one, whatever ``sliding_window`` says.
    """
    in_use = settings.flag("use_sliding_window", False)
    window = settings.optional_integer("sliding_window", absent=4096) if in_use else None
    if window is None:
        return layer_windows(settings, [False] * num_layers, None)
    first = settings.integer("max_window_layers", 28, minimum=0)
    return layer_windows(settings, [index >= first for index in range(num_layers)], window)
