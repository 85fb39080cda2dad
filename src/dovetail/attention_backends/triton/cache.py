"""The KV cache of a layer.

Keys are (B, K, P, E): what one program reads of a block, the positions of one KV head, lies in one
piece, and a vector's entries side by side, so that loads are wide. Values alike. Where entries are
coded (``kv_codec``), codes are uint8 and each vector has a bfloat16 scale, (B, K, P).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.attention_backends.kv_codec import CODECS, SCALE_DTYPE
from dovetail.attention_backends.memory import zeros
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec

__all__ = ["Cache", "make_cache"]


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Keys and values of all blocks of one layer."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    kv_dtype: str

    def parts(self) -> Iterator[Tensor]:
        """Every tensor; blocks are the first axis of each."""
        yield from (self.keys, self.values)
        if self.key_scales is not None and self.value_scales is not None:
            yield from (self.key_scales, self.value_scales)


def make_cache(
    spec: AttentionSpec, need: AttentionNeed, num_blocks: int, device: torch.device
) -> Cache:
    """A layer's cache, of zeros."""
    places = (num_blocks, spec.num_kv_heads, need.block_size)
    coded = need.kv_dtype in CODECS
    scale = str(SCALE_DTYPE).removeprefix("torch.")

    def vectors() -> Tensor:
        return zeros((*places, spec.head_size), "uint8" if coded else need.kv_dtype, device)

    def scales() -> Tensor | None:
        return zeros(places, scale, device) if coded else None

    return Cache(
        keys=vectors(),
        values=vectors(),
        key_scales=scales(),
        value_scales=scales(),
        kv_dtype=need.kv_dtype,
    )
