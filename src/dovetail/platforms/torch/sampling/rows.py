"""Rows of logits, whole or by blocks of the vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = ["BLOCK", "Rows", "Which", "on_device", "per_block"]

Which = npt.NDArray[np.integer[Any]]
"""Places among some rows."""

BLOCK = 64
"""Tokens per block of the vocabulary."""

_CACHED = 1 << 19
_AT_ONCE = 1 << 26


class Rows:
    """Some rows of logits, read as float32 a few at a time. Never changes them.

    Args:
        logits_NV: Any float dtype.
        index: The rows meant, in order; None means all of them.
    """

    def __init__(self, logits_NV: Tensor, index: Which | None = None) -> None:
        self._logits = logits_NV
        self._index = index
        self.device = logits_NV.device
        self.vocab_size = logits_NV.shape[1]

    @property
    def on_host(self) -> bool:
        """Whether looking at a result is free; elsewhere it would stop the device's queue."""
        return self.device.type == "cpu"

    def __len__(self) -> int:
        return len(self._logits) if self._index is None else len(self._index)

    def subset(self, which: Which) -> Rows:
        """Rows ``which`` of these, named in ascending order and once each."""
        if len(which) == len(self):
            return self
        return Rows(self._logits, which if self._index is None else self._index[which])

    def tensor(self) -> Tensor:
        """(n, V) in the dtype that the logits have; not a copy if all rows are meant."""
        if self._index is None:
            return self._logits
        return self._logits.index_select(0, self.index)

    @cached_property
    def index(self) -> Tensor:
        """(n,) int64: the rows' numbers, on the device."""
        if self._index is None:
            return torch.arange(len(self._logits), device=self.device)
        return self.places(self._index)

    def places(self, places: Which) -> Tensor:
        """The same numbers as an index on the device."""
        return on_device(places.astype(np.int64), self.device)

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Float32 rows, so many that what is computed from them stays in the host's cache.

        Yields:
            Which of the rows, and their logits (c, V); may be the caller's tensor itself. At least
            one chunk, which is empty if there are no rows.
        """
        elements = _CACHED if self.on_host else _AT_ONCE
        step = max(1, elements // self.vocab_size)
        whole = self._index is None
        for start in range(0, max(len(self), 1), step):
            part = slice(start, min(start + step, len(self)))
            taken = self._logits[part] if whole else self._logits[self.index[part]]
            yield part, taken.float()

    def take(self, ids_NK: Tensor) -> Tensor:
        """(n, K) float32: the logits of token ids (n, K)."""
        return self._logits[self.index[:, None], ids_NK].float()

    def take_blocks(self, blocks_NK: Tensor) -> tuple[Tensor, Tensor]:
        """Logits and ids, both (n, C), of whole blocks, and of the tokens behind the last."""
        rows, num_blocks = self.index[:, None], self.vocab_size // BLOCK
        main = num_blocks * BLOCK
        view = self._logits[:, :main].view(len(self._logits), num_blocks, BLOCK)
        values = view[rows, blocks_NK].flatten(1)
        within = torch.arange(BLOCK, device=self.device)
        ids = (blocks_NK[:, :, None] * BLOCK + within).flatten(1)
        if main < self.vocab_size:
            rest = torch.arange(main, self.vocab_size, device=self.device).expand(len(self), -1)
            values = torch.cat((values, self._logits[rows, rest]), 1)
            ids = torch.cat((ids, rest), 1)
        return values.float(), ids

    def maxima(self) -> Tensor:
        """(n, ceil(V / BLOCK)) float32: the largest logit of each block; NaN if it holds NaN."""
        parts = [per_block(x, BLOCK, torch.amax) for _, x in self.chunks()]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def on_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array's values on the device, without waiting for what the device has still to do."""
    return torch.from_numpy(array).to(device, non_blocking=True)


def per_block(x_NV: Tensor, size: int, reduce: Callable[..., Tensor]) -> Tensor:
    """(N, ceil(V / size)): each block of ``size`` columns reduced to one number."""
    num_blocks, rest = divmod(x_NV.shape[1], size)
    main = num_blocks * size
    if not num_blocks:
        return reduce(x_NV, dim=-1, keepdim=True)
    blocks = reduce(x_NV[:, :main].view(len(x_NV), num_blocks, size), dim=-1)
    if not rest:
        return blocks
    return torch.cat((blocks, reduce(x_NV[:, main:], dim=-1, keepdim=True)), 1)
