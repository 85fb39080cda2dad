"""Qwen 3, dense (Yang et al., 2025): a norm over each head of q and k instead of biases."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.core.contracts.model import Tensor
from dovetail.core.models.blocks import GATED_ACTIVATIONS, NormAndRotate
from dovetail.core.models.decoder import PreNormLayer, RotaryDecoder
from dovetail.core.models.qwen2 import qwen_windows
from dovetail.core.models.rotary import Rotary
from dovetail.core.models.separate import attention, layer_name, mlp, pre_norm_layer
from dovetail.core.models.settings import Settings
from dovetail.core.models.sizes import Sizes

__all__ = ["Qwen3"]

ARCHITECTURE = "Qwen3ForCausalLM"


class Qwen3(RotaryDecoder):
    """Llama with normed queries and keys."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, max_model_len: int) -> Qwen3:
        """Read the config. Raises CheckpointError and UnsupportedError."""
        settings = Settings(config, ARCHITECTURE)
        sizes = Sizes.read(settings, max_model_len=max_model_len, head_dim=128)
        bias = settings.flag("attention_bias", False)
        activation = settings.choice("hidden_act", GATED_ACTIVATIONS, "silu")

        def layer(index: int, window: int | None) -> PreNormLayer:
            spec = sizes.attention(index, window=window)
            attend = attention(sizes, spec, _head_norms(sizes, index), qkv_bias=bias, out_bias=bias)
            return pre_norm_layer(sizes, attend, mlp(sizes, index, activation))

        return cls(
            sizes=sizes,
            rotary=Rotary.from_config(settings, head_size=sizes.head, max_model_len=max_model_len),
            layers=[layer(*each) for each in enumerate(qwen_windows(settings, sizes.layers))],
            tied=settings.flag("tie_word_embeddings", False),
        )


def _head_norms(sizes: Sizes, layer: int) -> NormAndRotate:
    at = f"{layer_name(layer)}.self_attn"
    return NormAndRotate(
        q_norm=Tensor(source=f"{at}.q_norm.weight", shape=(sizes.head,)),
        k_norm=Tensor(source=f"{at}.k_norm.weight", shape=(sizes.head,)),
        eps=sizes.eps,
    )
