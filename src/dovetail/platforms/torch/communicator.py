"""Collectives over gloo on copies in host memory: the default of every torch platform."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore, ProcessGroupGloo  # type: ignore[attr-defined]

__all__ = ["PATIENCE", "HostCommunicator"]

PATIENCE = timedelta(seconds=60)
"""How long a member waits for the others."""


class HostCommunicator:
    """See ``core/contracts/communicator.py``. Works for tensors of any device.

    Args:
        rank: Of this process.
        size: Of the group.
        address: A path that all members can write to, of a file that is not there yet.

    Raises:
        RuntimeError: The others did not come in time.
    """

    def __init__(self, rank: int, size: int, address: str) -> None:
        self.rank = rank
        self.size = size
        # Any: torch's stubs lack half of its methods.
        self._group: Any = self._join(FileStore(address, size))

    def _join(self, store: FileStore) -> Any:
        return ProcessGroupGloo(store, self.rank, self.size, PATIENCE)

    def _staged(self, x: Tensor) -> Tensor:
        """A copy where the group can reach it."""
        return x.to("cpu", copy=True, memory_format=torch.contiguous_format)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over all members."""
        staged = self._staged(x)
        self._group.allreduce([staged]).wait()
        return staged.to(x.device)

    def all_gather(self, x: Tensor, axis: int) -> Tensor:
        """One after another, in order of rank."""
        staged = self._staged(x)
        parts = [torch.empty_like(staged) for _ in range(self.size)]
        self._group.allgather([parts], [staged]).wait()
        return torch.cat(parts, axis).to(x.device)

    def reduce_scatter(self, x: Tensor, axis: int) -> Tensor:
        """The member's share of the sum."""
        if x.shape[axis] % self.size:
            raise ValueError(
                f"axis {axis} of {tuple(x.shape)} cannot be cut evenly for {self.size} members"
            )
        return self.all_reduce(x).chunk(self.size, axis)[self.rank].contiguous()

    def broadcast(self, x: Tensor, source: int) -> Tensor:
        """The array of ``source``."""
        staged = self._staged(x)
        self._group.broadcast(staged, source).wait()
        return staged.to(x.device)

    def barrier(self) -> None:
        """Wait for everybody."""
        self._group.barrier().wait()

    def close(self) -> None:
        """Leave the group."""
        self._group.shutdown()
