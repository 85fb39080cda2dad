"""The measures that decoders of the Llama kind share, read from their config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.errors import CheckpointError
from dovetail.core.models.settings import Settings

__all__ = ["Sizes", "layer_windows"]


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Widths and counts. ``q`` and ``kv`` are rows of the projections: heads times head size."""

    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    head: int
    positions: int
    """``max_position_embeddings``."""
    eps: float
    """Of the norms."""
    max_model_len: int

    @classmethod
    def read(
        cls,
        settings: Settings,
        *,
        max_model_len: int,
        head_dim: int | None = None,
        eps: float = 1e-6,
    ) -> Sizes:
        """Read them; ``head_dim`` and ``eps`` are for configs that lack the key.

        Raises:
            CheckpointError: A key is missing, or its value cannot be.
        """
        heads = settings.integer("num_attention_heads")
        kv_heads = settings.integer("num_key_value_heads", heads)
        hidden = settings.integer("hidden_size")
        if heads % kv_heads:
            raise CheckpointError(
                f"config.json has {heads} num_attention_heads and {kv_heads} num_key_value_heads; "
                "the first must be a multiple of the second."
            )
        return cls(
            vocab=settings.integer("vocab_size"),
            hidden=hidden,
            intermediate=settings.integer("intermediate_size"),
            layers=settings.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=kv_heads,
            head=settings.integer("head_dim", head_dim or hidden // heads),
            positions=settings.integer("max_position_embeddings"),
            eps=settings.number("rms_norm_eps", eps),
            max_model_len=max_model_len,
        )

    @property
    def q(self) -> int:
        """Rows of the query projection."""
        return self.heads * self.head

    @property
    def kv(self) -> int:
        """Rows of the key projection, and of the value projection."""
        return self.kv_heads * self.head

    def attention(
        self,
        layer: int,
        *,
        window: int | None = None,
        scale: float | None = None,
        soft_cap: float | None = None,
    ) -> AttentionSpec:
        """The attention of a layer. A window that no sequence outgrows is left out."""
        seen = window if window is not None and window < self.max_model_len else None
        return AttentionSpec(
            layer=layer,
            num_heads=self.heads,
            num_kv_heads=self.kv_heads,
            head_size=self.head,
            scale=self.head**-0.5 if scale is None else scale,
            window=seen,
            soft_cap=soft_cap,
        )


_LAYER_TYPES: Mapping[str, bool] = {"full_attention": False, "sliding_attention": True}


def layer_windows(settings: Settings, default: list[bool], window: int | None) -> list[int | None]:
    """The window of each layer, from ``layer_types`` or, where the config has none, ``default``.

    Args:
        settings: The config.
        default: For each layer, whether it has the window.
        window: Positions that such a layer sees.

    Raises:
        CheckpointError: A layer has the window, but there is none.
        UnsupportedError: A type of layer that is neither full nor sliding attention.
    """
    sliding = default
    if settings.has("layer_types"):
        types: Any = settings.strings("layer_types", len(default), tuple(_LAYER_TYPES))
        sliding = [_LAYER_TYPES[kind] for kind in types]
    if any(sliding) and window is None:
        raise CheckpointError(
            f"config.json gives {sum(sliding)} layers sliding_attention, but no window in use; "
            "set sliding_window (and use_sliding_window where the family has it)."
        )
    return [window if slides else None for slides in sliding]
