"""What a model asks of a device, as far as its config says."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.core.contracts.attention import AttentionBackend, AttentionNeed, AttentionSpec
from dovetail.core.contracts.runner import RunnerConfig

__all__ = ["attention_need", "block_bytes", "widest_layer", "widest_window"]


def attention_need(config: RunnerConfig, specs: tuple[AttentionSpec, ...]) -> AttentionNeed:
    """What the layers of a model ask for together."""
    return AttentionNeed(
        specs=specs,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        block_size=config.block_size,
        deterministic=config.deterministic,
        max_len=config.max_model_len,
    )


def block_bytes(backend: AttentionBackend, need: AttentionNeed) -> int:
    """Bytes of a KV block, of all layers."""
    return sum(backend.bytes_per_block(spec, need) for spec in need.specs)


def widest_layer(config: RunnerConfig, vocab_size: int) -> int:
    """The most features of a token between two layers, as the checkpoint's sizes bound it."""
    sizes = [v for k, v in config.hf_config.items() if k.endswith("_size") and _is_count(v)]
    return max((size for size in sizes if size != vocab_size), default=4096)


def widest_window(windows: Sequence[int | None]) -> int | None:
    """The window of several models together: None, which is no limit, is the widest."""
    known = [window for window in windows if window is not None]
    return max(known) if len(known) == len(windows) else None


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0
