"""Arrays between the host and a device: many in one copy there, and back without stopping it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dovetail.core.errors import InvariantError
from dovetail.platforms.torch.queue import DeviceQueue, Mark

__all__ = ["Fetch", "Fetched", "Uploads", "fetch_later", "fetcher"]

_ALIGNMENT = 4
"""Elements of 4 bytes: every array begins at a multiple of 16 bytes."""
_DTYPES = {
    np.dtype(np.int32): torch.int32,
    np.dtype(np.int64): torch.int64,
    np.dtype(np.float32): torch.float32,
}

Arrays: TypeAlias = Sequence[npt.NDArray[Any]]


class Uploads:
    """Memory of the device that takes the arrays of one step after the other.

    Args:
        queue: Copies wait in it for what reads the arrays of the step before.
        device: Where they go.
        capacity: Elements of 4 bytes that the largest step has.
        kept: Elements in front of them that no step brings.
    """

    def __init__(
        self, queue: DeviceQueue, device: torch.device, capacity: int, kept: int = 0
    ) -> None:
        self._queue = queue
        self._first = _aligned(kept)
        self.memory = torch.zeros(self._first + capacity, dtype=torch.int32, device=device)
        """int32: what is kept, then what a step brings."""
        self.kept = self.memory[:kept]

    def send(self, arrays: Arrays) -> None:
        """Give the device a copy of int32, int64 and float32 arrays, all in one go.

        Raises:
            InvariantError: They are larger than any step was said to be.
        """
        starts, total = _layout(arrays)
        room = self.memory[self._first :]
        if total > len(room):
            raise InvariantError("engine", f"a step of {total} numbers for {len(room)}")
        host = self._queue.host_memory((total,), torch.int32)
        flat = host.numpy()
        for array, start in zip(arrays, starts, strict=True):
            flat[start : start + _words(array)] = array.ravel().view(np.int32)
        room[:total].copy_(host, non_blocking=True)

    def views(self, arrays: Arrays) -> list[Tensor]:
        """Where ``send`` puts them. They lie at the same places as others of the same sizes.

        The last one, flat, goes on to the end of the memory: another step's may be longer.
        """
        starts, _ = _layout(arrays)
        room = self.memory[self._first :]
        views = [
            room[start : start + _words(array)].view(_DTYPES[array.dtype]).view(array.shape)
            for array, start in zip(arrays[:-1], starts, strict=False)
        ]
        return [*views, room[starts[-1] :].view(_DTYPES[arrays[-1].dtype])]

    @staticmethod
    def place(kept: int, before: Arrays) -> int:
        """Where in ``memory`` the array behind others lies."""
        return _aligned(kept) + _layout(before)[1]

    @staticmethod
    def size(arrays: Arrays) -> int:
        """Elements of 4 bytes that they take."""
        return _layout(arrays)[1]


def _layout(arrays: Arrays) -> tuple[list[int], int]:
    starts, total = [], 0
    for array in arrays:
        starts.append(total)
        total += _aligned(_words(array))
    return starts, total


def _words(array: npt.NDArray[Any]) -> int:
    return array.nbytes // 4


def _aligned(words: int) -> int:
    return -(-words // _ALIGNMENT) * _ALIGNMENT


class Fetched(Protocol):
    """A tensor on its way to the host."""

    def numpy(self) -> npt.NDArray[Any]:
        """Wait for it."""
        ...


Fetch: TypeAlias = Callable[[Tensor], Fetched]


class _Arriving:
    def __init__(self, host: Tensor, mark: Mark) -> None:
        self._host = host
        self._mark = mark

    def numpy(self) -> npt.NDArray[Any]:
        self._mark.wait()
        return self._host.numpy()


class _Later:
    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def numpy(self) -> npt.NDArray[Any]:
        return self._tensor.cpu().numpy()


def fetch_later(tensor: Tensor) -> Fetched:
    """Copied when it is asked for."""
    return _Later(tensor)


def fetcher(queue: DeviceQueue) -> Fetch:
    """Copies that begin at once, behind what the device has still to do."""

    def fetch(tensor: Tensor) -> Fetched:
        host = queue.host_memory(tuple(tensor.shape), tensor.dtype)
        host.copy_(tensor, non_blocking=True)
        return _Arriving(host, queue.mark())

    return fetch
