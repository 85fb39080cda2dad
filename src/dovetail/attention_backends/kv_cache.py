"""The KV cache of a layer, for backends that keep each head's positions together.

What is stored is all that is ever read: a query sees the keys of its own step as later steps will
see them, so that neither chunks nor cached prefixes change a result.
"""

from __future__ import annotations

import math
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dovetail.attention_backends.kv_codec import CODECS, SCALE_DTYPE, Codec
from dovetail.attention_backends.memory import zeros
from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import ITEM_SIZE, IndexArray, IntArray

__all__ = [
    "KvCache",
    "bytes_per_block",
    "leftovers",
    "make_cache",
    "refuses_kv_dtype",
    "tables_within",
]

_MOST_DECODED = 1 << 18
"""Entries that are decoded at a time: few enough to stay in a processor's cache."""


class KvCache(Protocol):
    """Keys and values of all blocks of one layer."""

    def write(self, k_TKE: Tensor, v_TKE: Tensor, blocks_T: Tensor, offsets_T: Tensor) -> None:
        """Put each token's key and value into its block, at its offset."""
        ...

    def write_one(self, k_1KE: Tensor, v_1KE: Tensor, block: int, offset: int) -> None:
        """The same for one token, without an index kernel."""
        ...

    def gather(self, blocks_X: Tensor, dtype: torch.dtype) -> Tensor:
        """Copies of keys and values of some blocks, one after another: (2, K, positions, E)."""
        ...

    def copy(self, source: Tensor, target: Tensor) -> None:
        """Copy whole blocks."""
        ...


class _Plain:
    """Entries as they are, perhaps of another float dtype: (2, K, B, P, E)."""

    def __init__(self, entries: Tensor) -> None:
        self._entries = entries

    def write(self, k_TKE: Tensor, v_TKE: Tensor, blocks_T: Tensor, offsets_T: Tensor) -> None:
        by_place = self._entries.permute(0, 2, 3, 1, 4)
        for side, fresh in enumerate((k_TKE, v_TKE)):
            by_place[side, blocks_T, offsets_T] = fresh.to(self._entries.dtype)

    def write_one(self, k_1KE: Tensor, v_1KE: Tensor, block: int, offset: int) -> None:
        for side, fresh in enumerate((k_1KE, v_1KE)):
            self._entries[side, :, block, offset].copy_(fresh[0])

    def gather(self, blocks_X: Tensor, dtype: torch.dtype) -> Tensor:
        return self._entries.index_select(2, blocks_X).flatten(2, 3).to(dtype)

    def copy(self, source: Tensor, target: Tensor) -> None:
        self._entries[:, :, target] = self._entries[:, :, source]


class _Coded:
    """One byte per entry, uint8 (2, K, B, P, E), and a scale per vector, (2, K, B, P)."""

    def __init__(self, codes: Tensor, scales: Tensor, codec: Codec) -> None:
        self._codes = codes
        self._scales = scales
        self._codec = codec

    def write(self, k_TKE: Tensor, v_TKE: Tensor, blocks_T: Tensor, offsets_T: Tensor) -> None:
        for side, fresh in enumerate((k_TKE, v_TKE)):
            codes, scales = self._codec.encode(fresh)
            self._codes.permute(0, 2, 3, 1, 4)[side, blocks_T, offsets_T] = codes
            self._scales.permute(0, 2, 3, 1)[side, blocks_T, offsets_T] = scales

    def write_one(self, k_1KE: Tensor, v_1KE: Tensor, block: int, offset: int) -> None:
        codes, scales = self._codec.encode(torch.cat([k_1KE, v_1KE]))
        self._codes[:, :, block, offset].copy_(codes)
        self._scales[:, :, block, offset].copy_(scales)

    def gather(self, blocks_X: Tensor, dtype: torch.dtype) -> Tensor:
        num_sides, num_heads, _, *block = self._codes.shape
        out = self._codes.new_empty(num_sides, num_heads, len(blocks_X), *block, dtype=dtype)
        size = max(1, _MOST_DECODED // (num_sides * num_heads * math.prod(block)))
        for part, chosen in zip(
            torch.split(out, size, 2), torch.split(blocks_X, size), strict=True
        ):
            codes = self._codes.index_select(2, chosen)
            part.copy_(self._codec.decode(codes, self._scales.index_select(2, chosen)))
        return out.flatten(2, 3)

    def copy(self, source: Tensor, target: Tensor) -> None:
        for part in (self._codes, self._scales):
            part[:, :, target] = part[:, :, source]


def tables_within(batch: Batch, rows: IndexArray, width: int, block_size: int) -> IntArray:
    """The first blocks of some rows, (R, width); 0 behind the last that has a position."""
    reach = -(-batch.sequence_lens[rows] // block_size)
    tables = batch.block_tables[rows, :width]
    wide = np.zeros((len(rows), width), tables.dtype)
    np.copyto(wide[:, : tables.shape[1]], tables, where=np.arange(tables.shape[1]) < reach[:, None])
    return wide


def leftovers(batch: Batch, rows: IndexArray, width: int, block_size: int) -> IndexArray:
    """Places behind some rows' last positions, in their last blocks, where each row has ``width``
    places, one row after another.

    Requests before may have left anything there, and what is no number survives a weight of 0. The
    blocks behind are block 0: whoever reads that far writes nothing to it.
    """
    lens = batch.sequence_lens[rows].astype(np.intp)
    counts = -lens % block_size
    firsts = np.arange(len(rows)) * width + lens
    before = counts.cumsum() - counts
    places: IndexArray = np.arange(counts.sum()) + (firsts - before).repeat(counts)
    return places


def refuses_kv_dtype(need: AttentionNeed) -> str | None:
    """Why these caches cannot be of the dtype that is needed; None if they can."""
    known = (*ITEM_SIZE, *CODECS)
    return None if need.kv_dtype in known else f"it keeps {', '.join(known)}, not {need.kv_dtype}"


def bytes_per_block(spec: AttentionSpec, need: AttentionNeed) -> int:
    """Keys, values and scales of one block of one layer."""
    vectors = 2 * need.block_size * spec.num_kv_heads
    if need.kv_dtype in CODECS:
        return vectors * (spec.head_size + SCALE_DTYPE.itemsize)
    return vectors * spec.head_size * ITEM_SIZE[need.kv_dtype]


def make_cache(
    spec: AttentionSpec, need: AttentionNeed, num_blocks: int, device: torch.device
) -> KvCache:
    """A layer's cache."""
    places = (2, spec.num_kv_heads, num_blocks, need.block_size)
    shape = (*places, spec.head_size)
    if need.kv_dtype not in CODECS:
        return _Plain(zeros(shape, need.kv_dtype, device))
    scales = zeros(places, str(SCALE_DTYPE).removeprefix("torch."), device)
    return _Coded(zeros(shape, "uint8", device), scales, CODECS[need.kv_dtype])
