"""A device that works off what it is given by itself, so that the host need not wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["DeviceQueue", "HostQueue", "Mark"]


class Mark(Protocol):
    """A point in the queue."""

    def wait(self) -> None:
        """Return once the device has done all that was before it."""
        ...


class DeviceQueue(Protocol):
    """The one queue to which a runner gives its work, in order."""

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory of the host, not initialized, that the device can copy from and to by itself.

        It may be dropped while a copy is under way.
        """
        ...

    def mark(self) -> Mark:
        """The point behind everything given so far."""
        ...

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work, and return what repeats it: the same launches over the same memory.

        Args:
            work: May not look at what the device computes, and takes no arguments: what differs
                from one repetition to the next lies in memory that it has been given.
        """
        ...


class HostQueue:
    """The host as its own device: work is done when it is given, and repeated by doing it again."""

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Any memory will do."""
        return torch.empty(shape, dtype=dtype)

    def mark(self) -> Mark:
        """Nothing is outstanding."""
        return _Done()

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """The work itself."""
        work()
        return work


class _Done:
    def wait(self) -> None:
        return
