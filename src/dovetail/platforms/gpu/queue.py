"""The queue of a GPU that torch drives: one stream, pinned memory, graphs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dovetail.platforms.torch.queue import Mark

__all__ = ["GpuQueue"]


class GpuQueue:
    """The current stream of a device.

    Args:
        device: A GPU. Graphs recorded here share memory, so that no two may run at a time.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._aside = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def host_memory(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Pinned; torch gives it to others only once copies of this stream are done with it."""
        return torch.empty(shape, dtype=dtype, pin_memory=True)

    def mark(self) -> Mark:
        """An event."""
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(self._device))
        return _Event(event)

    def record(self, work: Callable[[], None]) -> Callable[[], None]:
        """As a graph. The work is run once before, so that no kernel is compiled meanwhile."""
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.stream(self._aside):
            work()
            # Not torch.cuda.graph, which collects garbage and empties the cache for every graph.
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            finally:
                graph.capture_end()
        torch.cuda.synchronize(self._device)
        return graph.replay


class _Event:
    def __init__(self, event: torch.cuda.Event) -> None:
        self._event = event

    def wait(self) -> None:
        self._event.synchronize()
