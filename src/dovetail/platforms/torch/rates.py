"""How fast a torch device reads its memory and multiplies matrices, measured."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch

from dovetail.core.contracts.platform import Rates
from dovetail.core.errors import OutOfMemoryError
from dovetail.platforms.torch.dtypes import torch_dtype
from dovetail.platforms.torch.platform import TorchPlatform

__all__ = ["measure_rates"]

_LARGEST, _SMALLEST = 1 << 30, 1 << 26
"""Bytes of the arrays that are read: far more than a cache holds, where there is room."""
_MEMORY_SHARE = 4
"""Of the free memory, at most a part of this many goes to each of the arrays."""
_WIDTHS = (256, 512, 1024, 2048, 4096, 8192)
"""Of the square matrices: the first that takes long enough is measured."""
_LONG_ENOUGH = 0.02
"""Seconds, beside which starting the work and waiting for it do not count."""
_FEWEST, _MOST = 3, 9
"""Bursts."""
_ENOUGH = 0.3
"""Seconds of bursts after which there is no need for the most."""


def measure_rates(platform: TorchPlatform, dtype: str) -> Rates:
    """Measure a platform's device.

    The rate of memory is the better one of a sum, which only reads, and a copy, whose bytes read
    and bytes written count alike: which comes closer to the memory's limit differs by device. That
    of products is the better one of the dtype's and float32's: numbers that a device has no
    instruction for can be widened, whether or not torch does it well.
    """
    try:
        return Rates(
            read_bytes_per_second=_memory_rate(platform),
            matrix_flops_per_second=max(
                _matrix_rate(platform, each) for each in {torch_dtype(dtype), torch.float32}
            ),
        )
    except torch.OutOfMemoryError as error:
        raise OutOfMemoryError(
            f"There is no room to measure the device: {error}. Lower gpu_memory_utilization."
        ) from error


def _memory_rate(platform: TorchPlatform) -> float:
    device = platform.device
    free = platform.memory(device.index or 0).free
    num_bytes = min(_LARGEST, max(_SMALLEST, free // _MEMORY_SHARE))
    source = torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    read = num_bytes / _seconds(platform, source.sum)
    target = torch.ones_like(source)
    return max(read, 2 * num_bytes / _seconds(platform, lambda: target.copy_(source)))


def _matrix_rate(platform: TorchPlatform, dtype: torch.dtype) -> float:
    rate = 0.0
    for width in _WIDTHS:
        a, b = (_numbers(seed, width).to(platform.device, dtype) for seed in range(2))
        out = torch.empty_like(a)
        work = partial(torch.mm, a, b, out=out)
        once = _burst(platform, work, 1)
        if once > _LONG_ENOUGH or width == _WIDTHS[-1]:
            rate = 2 * width**3 / _seconds(platform, work)
            break
    return rate


def _numbers(seed: int, width: int) -> torch.Tensor:
    """(width, width) of random numbers: what is easy to multiply may be multiplied faster."""
    random = torch.Generator().manual_seed(seed)
    tile = torch.randn((_WIDTHS[0], _WIDTHS[0]), generator=random)
    return tile.repeat(width // _WIDTHS[0], width // _WIDTHS[0])


@torch.inference_mode()
def _burst(platform: TorchPlatform, work: Callable[[], object], count: int) -> float:
    """Seconds that ``count`` pieces of work take together."""
    platform.synchronize()
    start = time.perf_counter()
    for _ in range(count):
        work()
    platform.synchronize()
    return time.perf_counter() - start


def _seconds(platform: TorchPlatform, work: Callable[[], object]) -> float:
    """Of one piece of work: the median of several bursts, each long enough to be timed."""
    _burst(platform, work, 1)
    count = 1
    while _burst(platform, work, count) < _LONG_ENOUGH:
        count *= 2
    bursts: list[float] = []
    while len(bursts) < _FEWEST or (len(bursts) < _MOST and sum(bursts) < _ENOUGH):
        bursts.append(_burst(platform, work, count))
    return median(bursts) / count
