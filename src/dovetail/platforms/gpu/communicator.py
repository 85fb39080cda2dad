"""Collectives from device to device, through NCCL or, in AMD's build of torch, RCCL."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed import FileStore  # type: ignore[attr-defined]

from dovetail.platforms.torch.communicator import PATIENCE, HostCommunicator

__all__ = ["DeviceCommunicator"]


class DeviceCommunicator(HostCommunicator):
    """See ``core/contracts/communicator.py``. Arrays never pass through the host.

    Args:
        rank: Of this process.
        size: Of the group.
        address: A path that all members can write to, of a file that is not there yet.
        device: Of this process; each member has one of its own.
    """

    def __init__(self, rank: int, size: int, address: str, device: torch.device) -> None:
        self._device = device
        super().__init__(rank, size, address)

    def _join(self, store: FileStore) -> Any:
        from torch.distributed import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timedelta(seconds=PATIENCE.total_seconds())
        torch.cuda.set_device(self._device)
        return ProcessGroupNCCL(store, self.rank, self.size, options)

    def _staged(self, x: Tensor) -> Tensor:
        """A copy on the device."""
        return x.to(self._device, copy=True, memory_format=torch.contiguous_format)
