"""Layers whose checkpoints hold q, k, v, gate and up one by one, by the names Llama gave them."""

from __future__ import annotations

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Tensor
from dovetail.core.models.blocks import Attention, GatedMlp, HeadPositions, linear
from dovetail.core.models.decoder import PreNormLayer
from dovetail.core.models.sizes import Sizes

__all__ = ["attention", "layer_name", "mlp", "pre_norm_layer"]


def layer_name(layer: int) -> str:
    """Where a layer's tensors are in the checkpoint."""
    return f"model.layers.{layer}"


def attention(
    sizes: Sizes,
    spec: AttentionSpec,
    positions: HeadPositions,
    *,
    qkv_bias: bool = False,
    out_bias: bool = False,
) -> Attention:
    """``self_attn`` of the layer that ``spec`` is for."""
    at = f"{layer_name(spec.layer)}.self_attn"
    rows = {f"{at}.q_proj": sizes.q, f"{at}.k_proj": sizes.kv, f"{at}.v_proj": sizes.kv}
    return Attention(
        spec=spec,
        qkv=linear(rows, sizes.hidden, split="out", bias=qkv_bias),
        out=linear({f"{at}.o_proj": sizes.hidden}, sizes.q, split="in", bias=out_bias),
        positions=positions,
    )


def mlp(sizes: Sizes, layer: int, activation: str, *, bias: bool = False) -> GatedMlp:
    """``mlp`` of a layer."""
    at = f"{layer_name(layer)}.mlp"
    rows = {f"{at}.gate_proj": sizes.intermediate, f"{at}.up_proj": sizes.intermediate}
    return GatedMlp(
        gate_up=linear(rows, sizes.hidden, split="out", bias=bias),
        down=linear({f"{at}.down_proj": sizes.hidden}, sizes.intermediate, split="in", bias=bias),
        activation=activation,
    )


def pre_norm_layer(sizes: Sizes, attention: Attention, mlp: GatedMlp) -> PreNormLayer:
    """The two with their norms."""
    at = layer_name(attention.spec.layer)
    return PreNormLayer(
        input_norm=Tensor(source=f"{at}.input_layernorm.weight", shape=(sizes.hidden,)),
        attention=attention,
        post_norm=Tensor(source=f"{at}.post_attention_layernorm.weight", shape=(sizes.hidden,)),
        mlp=mlp,
        eps=sizes.eps,
    )
