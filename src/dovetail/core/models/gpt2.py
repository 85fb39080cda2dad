"""GPT-2 (Radford et al., 2019)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Linear, Tensor
from dovetail.core.errors import CheckpointError
from dovetail.core.models.blocks import ACTIVATIONS, Attention, Mlp, Unrotated
from dovetail.core.models.learned import LearnedDecoder, NormBefore, layer_norm
from dovetail.core.models.settings import Settings

__all__ = ["Gpt2"]

ARCHITECTURE = "GPT2LMHeadModel"


class Gpt2(LearnedDecoder):
    """Linear layers are stored transposed; q, k, v are one tensor."""

    # Older checkpoints hold the causal mask of each layer.
    ignored = (*LearnedDecoder.ignored, r"(transformer\.)?h\.\d+\.attn\.(masked_)?bias")

    @classmethod
    def from_config(cls, config: Mapping[str, Any], *, max_model_len: int) -> Gpt2:
        """Read the config. Raises CheckpointError and UnsupportedError."""
        settings = Settings(config, ARCHITECTURE)
        settings.require("add_cross_attention", only=False)
        hidden = settings.integer("n_embd")
        inner = settings.integer("n_inner", 4 * hidden)
        eps = settings.number("layer_norm_epsilon", 1e-5)
        positions = settings.integer("n_positions")
        activation = settings.choice("activation_function", ACTIVATIONS, "gelu_new")

        def layer(spec: AttentionSpec) -> NormBefore:
            at = f"transformer.h.{spec.layer}"
            return NormBefore(
                attention_norm=layer_norm(f"{at}.ln_1", hidden, eps),
                attention=_attention(at, hidden, spec),
                mlp_norm=layer_norm(f"{at}.ln_2", hidden, eps),
                mlp=Mlp(
                    up=_conv1d(f"{at}.mlp.c_fc", (inner,), hidden, "out"),
                    down=_conv1d(f"{at}.mlp.c_proj", (hidden,), inner, "in"),
                    activation=activation,
                ),
            )

        return cls(
            embed=Tensor(
                source="transformer.wte.weight", shape=(settings.integer("vocab_size"), hidden)
            ),
            position_embed=Tensor(source="transformer.wpe.weight", shape=(positions, hidden)),
            max_positions=positions,
            max_model_len=max_model_len,
            layers=[layer(spec) for spec in _specs(settings, hidden)],
            final_norm=layer_norm("transformer.ln_f", hidden, eps),
            tied=settings.flag("tie_word_embeddings", True),
        )


def _specs(settings: Settings, hidden: int) -> list[AttentionSpec]:
    heads = settings.integer("n_head")
    if hidden % heads:
        raise CheckpointError(
            f"config.json has n_embd = {hidden} and n_head = {heads}; "
            "the first must be a multiple of the second."
        )
    scale = (hidden // heads) ** -0.5 if settings.flag("scale_attn_weights", True) else 1.0
    by_layer = settings.flag("scale_attn_by_inverse_layer_idx", False)
    return [
        AttentionSpec(
            layer=index,
            num_heads=heads,
            num_kv_heads=heads,
            head_size=hidden // heads,
            scale=scale / (index + 1) if by_layer else scale,
        )
        for index in range(settings.integer("n_layer"))
    ]


def _attention(at: str, hidden: int, spec: AttentionSpec) -> Attention:
    return Attention(
        spec=spec,
        qkv=_conv1d(f"{at}.attn.c_attn", (hidden, hidden, hidden), hidden, "out"),
        out=_conv1d(f"{at}.attn.c_proj", (hidden,), hidden, "in"),
        positions=Unrotated(),
    )


def _conv1d(module: str, rows: tuple[int, ...], width: int, split: Any) -> Linear:
    return Linear(
        sources=(f"{module}.weight",),
        bias_sources=(f"{module}.bias",),
        out_features=rows,
        in_features=width,
        split=split,
        transposed=True,
    )
