"""The metadata of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch
from dovetail.core.types import IntArray

__all__ = ["Plan", "host_arrays", "sent"]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the kernels read, int32 on the device, and how they are launched."""

    starts: Tensor
    """(R + 2,) where each row's tokens begin; then those of no row; then T."""
    lens: Tensor
    """(R,) positions of each row once the step is written; 0 where a row has no tokens."""
    slots: Tensor
    """(T,) where each token's key and value go."""
    meta: Tensor
    """(1,) the width of the block tables."""
    tables: Tensor
    """(R * width,) KV blocks of each row."""
    num_tokens: int
    num_rows: int
    few: bool
    """There may be rows with few query tokens."""
    many: bool
    """There may be rows with many, or tokens of no row."""

    @property
    def alone(self) -> bool:
        """Token i is the one token of row i, or of no row."""
        return self.num_tokens == self.num_rows


def host_arrays(batch: Batch, block_size: int) -> tuple[IntArray, ...]:
    """Starts, lens, slots, meta and tables. Tables are as wide as the longest sequence needs."""
    starts = np.append(batch.query_starts, batch.num_tokens).astype(np.int32)
    lens = np.where(batch.query_lens > 0, batch.sequence_lens, 0).astype(np.int32)
    width = max(1, -(-int(lens.max()) // block_size))
    tables = np.ascontiguousarray(batch.block_tables[:, :width], np.int32).ravel()
    slots = batch.slots(block_size).astype(np.int32, copy=False)
    return starts, lens, slots, np.array([tables.size // len(lens)], np.int32), tables


def sent(arrays: Sequence[IntArray], device: torch.device) -> list[Tensor]:
    """The arrays on the device, in one copy that nobody waits for."""
    flat = torch.from_numpy(np.concatenate(arrays))
    if device.type != "cpu":
        flat = flat.pin_memory().to(device, non_blocking=True)
    return list(torch.split(flat, [array.size for array in arrays]))
