"""OPT (Zhang et al., 2022), and Galactica, which has its architecture (Taylor et al., 2022)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Tensor
from dovetail.core.errors import CheckpointError
from dovetail.core.models.blocks import ACTIVATIONS, Attention, Mlp, Unrotated, linear
from dovetail.core.models.learned import (
    LayerNorm,
    LearnedDecoder,
    LearnedLayer,
    NormAfter,
    NormBefore,
    Projection,
    Stage,
    Unchanged,
    layer_norm,
    plain_layer_norm,
)
from dovetail.core.models.settings import Settings
from dovetail.core.types import IntArray

__all__ = ["Opt"]

ARCHITECTURE = "OPTForCausalLM"
ROOT = "model.decoder"
FIRST_POSITION = 2
"""Row of the position table that the first token uses; those before it were for padding."""
EPS = 1e-5


class Opt(LearnedDecoder):
    """Norms before each part or, in the 350M model, after it."""

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, max_model_len: int) -> Opt:
        """Read the config. Raises CheckpointError and UnsupportedError."""
        settings = Settings(config, ARCHITECTURE)
        hidden = settings.integer("hidden_size")
        width = settings.integer("word_embed_proj_dim", hidden)
        positions = settings.integer("max_position_embeddings")
        narrow = width != hidden
        norm_before = settings.flag("do_layer_norm_before", True)
        ends_normed = norm_before and not settings.flag("_remove_final_layer_norm", False)
        norm = _norms(settings, hidden)
        final_norm: Stage = norm(f"{ROOT}.final_layer_norm") if ends_normed else Unchanged()
        return cls(
            embed=Tensor(
                source=f"{ROOT}.embed_tokens.weight", shape=(settings.integer("vocab_size"), width)
            ),
            position_embed=Tensor(
                source=f"{ROOT}.embed_positions.weight",
                shape=(positions + FIRST_POSITION, hidden),
            ),
            max_positions=positions,
            max_model_len=max_model_len,
            stage_in=_projection("project_in", width, hidden) if narrow else Unchanged(),
            layers=_layers(settings, hidden, norm, NormBefore if norm_before else NormAfter),
            final_norm=final_norm,
            stage_out=_projection("project_out", hidden, width) if narrow else Unchanged(),
            tied=settings.flag("tie_word_embeddings", True),
        )

    def positions(self, positions_T: IntArray) -> IntArray:
        """Rows of the position table."""
        return positions_T + FIRST_POSITION


def _layers(
    settings: Settings,
    hidden: int,
    norm: Callable[[str], LayerNorm],
    kind: type[NormBefore] | type[NormAfter],
) -> list[LearnedLayer]:
    heads = settings.integer("num_attention_heads")
    if hidden % heads:
        raise CheckpointError(
            f"config.json has hidden_size = {hidden} and num_attention_heads = {heads}; "
            "the first must be a multiple of the second."
        )
    inner = settings.integer("ffn_dim")
    bias = settings.flag("enable_bias", True)
    activation = settings.choice("activation_function", ACTIVATIONS, "relu")

    def layer(index: int) -> LearnedLayer:
        at = f"{ROOT}.layers.{index}"
        return kind(
            attention_norm=norm(f"{at}.self_attn_layer_norm"),
            attention=_attention(f"{at}.self_attn", index, hidden, heads, bias=bias),
            mlp_norm=norm(f"{at}.final_layer_norm"),
            mlp=Mlp(
                up=linear({f"{at}.fc1": inner}, hidden, split="out", bias=bias),
                down=linear({f"{at}.fc2": hidden}, inner, split="in", bias=bias),
                activation=activation,
            ),
        )

    return [layer(index) for index in range(settings.integer("num_hidden_layers"))]


def _attention(at: str, layer: int, hidden: int, heads: int, *, bias: bool) -> Attention:
    rows = {f"{at}.{name}": hidden for name in ("q_proj", "k_proj", "v_proj")}
    size = hidden // heads
    return Attention(
        spec=AttentionSpec(
            layer=layer, num_heads=heads, num_kv_heads=heads, head_size=size, scale=size**-0.5
        ),
        qkv=linear(rows, hidden, split="out", bias=bias),
        out=linear({f"{at}.out_proj": hidden}, hidden, split="in", bias=bias),
        positions=Unrotated(),
    )


def _norms(settings: Settings, hidden: int) -> Callable[[str], LayerNorm]:
    if settings.flag("layer_norm_elementwise_affine", True):
        return lambda module: layer_norm(module, hidden, EPS)
    return lambda module: plain_layer_norm(hidden, EPS)


def _projection(name: str, width_in: int, width_out: int) -> Projection:
    return Projection(linear({f"{ROOT}.{name}": width_out}, width_in, split=None))
