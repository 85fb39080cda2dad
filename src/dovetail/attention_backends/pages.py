"""What backends over kernels of other packages share: a paged cache, and steps as they want them.

The cache of a layer is (2, B, P, K, E), keys and then values: pages as FlashAttention takes them,
and FlashInfer and AITER, who call it NHD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dovetail.attention_backends.memory import zeros
from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.errors import InvariantError
from dovetail.core.types import ITEM_SIZE, IntArray

__all__ = [
    "Library",
    "PagedCache",
    "PageRuns",
    "Slots",
    "alone",
    "page_runs",
    "pinned",
    "refuses_need",
    "sent",
]

_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Library:
    """A package that is used where it is installed."""

    module: str
    """What is imported."""
    install: str
    """The command that installs it, or where it is to be had."""
    functions: tuple[str, ...] = ()
    """Some that it has, where another package might have its name."""

    def missing(self) -> str | None:
        """Why it cannot be used; None if it is imported now."""
        try:
            found = import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name == self.module:
                return f"package {self.module} is not installed: {self.install}"
            return f"package {self.module} lacks module {error.name}: {self.install}"
        except Exception as error:
            return f"package {self.module} cannot be imported: {type(error).__name__}: {error}"
        lacking = [name for name in self.functions if not hasattr(found, name)]
        if lacking:
            what = f"has no {lacking[0]}, so it is too old or another of that name"
            return f"package {self.module} {what}: {self.install}"
        return None

    def function(self, name: str) -> Callable[..., Any]:
        """One of the package's, which is imported."""
        found: Callable[..., Any] = getattr(import_module(self.module), name)
        return found


def refuses_need(need: AttentionNeed) -> str | None:
    """Why none of these libraries serves a need; None if nothing speaks against it here."""
    if need.deterministic:
        return "into how many parts its sums are cut depends on the other rows"
    if need.dtype not in _DTYPES:
        return f"it computes in {' and '.join(_DTYPES)}, not {need.dtype}"
    if need.kv_dtype != need.dtype:
        return f"its cache has the dtype of the queries, {need.dtype}, not {need.kv_dtype}"
    if "alibi" in need.features:
        return "it is given no ALiBi slopes"
    return None


class PagedCache:
    """The parts of a backend that do not depend on the library.

    Args:
        device: Of the tensors.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys and values of one block."""
        vectors = 2 * need.block_size * spec.num_kv_heads
        return vectors * spec.head_size * ITEM_SIZE[need.kv_dtype]

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> Tensor:
        """(2, B, P, K, E), of zeros."""
        shape = (2, num_blocks, need.block_size, spec.num_kv_heads, spec.head_size)
        return zeros(shape, need.kv_dtype, self.device)

    def write(self, k_TKE: Tensor, v_TKE: Tensor, cache: Tensor, slots_T: Tensor) -> None:
        """Put each token's key and value into its slot; int64."""
        keys, values = cache.flatten(1, 2)
        keys[slots_T] = k_TKE
        values[slots_T] = v_TKE

    def copy_blocks(self, caches: Sequence[Tensor], pairs: IntArray) -> Sequence[Tensor]:
        """Copy in place, in every layer."""
        source, target = torch.from_numpy(pairs).long().to(self.device).unbind(1)
        for cache in caches:
            cache[:, target] = cache[:, source]
        return caches


class Slots:
    """Where the tokens of a step go, as torch indexes: made by the step's first layer, so that a
    replay makes it anew.

    Args:
        slots_T: (T,) int32, on the device.
        first_layer: The number of the layer that attends first.
    """

    def __init__(self, slots_T: Tensor, first_layer: int) -> None:
        self._slots_T = slots_T
        self._first_layer = first_layer
        self._index_T: Tensor | None = None

    def begins(self, layer: int) -> bool:
        """Whether a layer is the first of a step."""
        return layer == self._first_layer

    def index(self, layer: int) -> Tensor:
        """(T,) int64"""
        if self.begins(layer):
            self._index_T = self._slots_T.long()
        if self._index_T is None:
            raise InvariantError(
                "engine", f"layer {layer} attends before layer {self._first_layer}"
            )
        return self._index_T


class PageRuns(NamedTuple):
    """The KV blocks of R rows, one row after another (compressed sparse rows)."""

    lens: IntArray
    """(R,) positions of each row, at least 1."""
    starts: IntArray
    """(R + 1,) where its blocks begin."""
    pages: IntArray
    """Flat. A row that has no tokens has one: block 0, which is nobody's."""

    def last_page_lens(self, block_size: int) -> IntArray:
        """(R,) positions in the last block of each row, 1 to the block's size."""
        return (self.lens - 1) % block_size + 1


def page_runs(batch: Batch, block_size: int) -> PageRuns:
    """The blocks that the rows of a step have a token in."""
    lens = np.maximum(batch.sequence_lens, 1).astype(np.int32)
    counts = -(-lens // block_size)
    starts = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    width = batch.block_tables.shape[1]
    shift = np.arange(len(lens), dtype=np.int64) * width - starts[:-1]
    place = np.arange(starts[-1], dtype=np.int64) + shift.repeat(counts)
    return PageRuns(lens, starts, batch.block_tables.ravel()[place].astype(np.int32, copy=False))


def alone(batch: Batch) -> bool:
    """Whether token i is the one token of row i, or of no row: a step that may be recorded."""
    return batch.num_tokens == batch.num_rows and int(batch.query_lens.max()) == 1


def pinned(array: IntArray, device: torch.device) -> Tensor:
    """An array in memory of the host that the device copies from by itself, where it is another."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, np.int32))
    return tensor if device.type == "cpu" else tensor.pin_memory()


def sent(arrays: Sequence[IntArray], device: torch.device) -> list[Tensor]:
    """Arrays of a step on the device, int32, without waiting for it."""
    return [pinned(array, device).to(device, non_blocking=True) for array in arrays]
