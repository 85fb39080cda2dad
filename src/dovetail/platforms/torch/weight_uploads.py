"""Weights from mapped files to a device, reading and sending at the same time."""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.platforms.torch.dtypes import from_numpy
from dovetail.platforms.torch.queue import DeviceQueue, Mark

__all__ = ["WeightUploads"]

_CHUNK = 32 << 20
_CHUNKS = 4
"""Copies under way, at most."""
_SMALL = 1 << 20
"""Bytes below which a tensor is not worth cutting up."""


class WeightUploads:
    """Copies arrays to a device through a few pieces of its queue's memory.

    Where a file is mapped, reading it is a matter of touching its pages: that happens while the
    pieces before are on their way.

    Args:
        queue: The device's.
        device: Where they go.
        chunk_bytes: How much is sent at a time.
    """

    def __init__(self, queue: DeviceQueue, device: torch.device, chunk_bytes: int = _CHUNK) -> None:
        self._queue = queue
        self._device = device
        self._chunk_bytes = chunk_bytes
        self._under_way: deque[tuple[Tensor, Mark]] = deque()

    def __call__(self, array: np.ndarray[Any, Any]) -> Tensor:
        """The array on the device, in its own dtype; whoever reads it there comes after it."""
        source = from_numpy(array)
        if source.nbytes < min(_SMALL, self._chunk_bytes) or not source.is_contiguous():
            return source.to(self._device)
        target = torch.empty_like(source, device=self._device)
        pairs = (tensor.view(-1).view(torch.uint8) for tensor in (source, target))
        for read, written in zip(
            *(torch.split(flat, self._chunk_bytes) for flat in pairs), strict=True
        ):
            piece = self._piece()[: len(read)]
            piece.copy_(read)
            written.copy_(piece, non_blocking=True)
            self._under_way.append((piece, self._queue.mark()))
        return target

    def _piece(self) -> Tensor:
        """Memory that nothing on the way uses."""
        if len(self._under_way) < _CHUNKS:
            return self._queue.host_memory((self._chunk_bytes,), torch.uint8)
        piece, mark = self._under_way.popleft()
        mark.wait()
        if len(piece) == self._chunk_bytes:
            return piece
        return self._queue.host_memory((self._chunk_bytes,), torch.uint8)
