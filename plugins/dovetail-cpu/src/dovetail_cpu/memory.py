"""Memory for weights, and how the process keeps what it has freed."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import mmap
import sys
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["HugePages", "keep_freed_memory", "share_in_large_pages"]

_CHUNK = 256 << 20
"""Bytes that are reserved at a time; they are taken from the system as they are written."""
_LEAST = 1 << 16
_PAGE = 2 << 20
_LINE = 64
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_KEPT = 1 << 30
_SMAPS = Path("/proc/self/smaps")
_ENABLED = Path("/sys/kernel/mm/transparent_hugepage/enabled")


class HugePages:
    """Memory in pages of 2 MiB where the system has them: a processor that streams through weights
    looks up far fewer of those.

    It is given back to the system when the last tensor of a reserved chunk is dropped.
    """

    def __init__(self) -> None:
        self._chunk: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A dense tensor, not initialized."""
        wanted = math.prod(shape) * dtype.itemsize
        if wanted < _LEAST or not hasattr(mmap, "MADV_HUGEPAGE"):
            return torch.empty(shape, dtype=dtype)
        if self._chunk is None or self._used + wanted > len(self._chunk):
            self._reserve(wanted)
        flat = torch.frombuffer(self._chunk, dtype=dtype, count=math.prod(shape), offset=self._used)
        self._used += -(-wanted // _LINE) * _LINE
        return flat.view(shape)

    def _reserve(self, wanted: int) -> None:
        size = -(-max(wanted + _PAGE, _CHUNK) // _PAGE) * _PAGE
        chunk = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        chunk.madvise(mmap.MADV_HUGEPAGE)
        self._chunk = chunk
        address = torch.frombuffer(chunk, dtype=torch.uint8).data_ptr()
        self._used = -address % _PAGE


def share_in_large_pages(
    file: Path, *, smaps: Path = _SMAPS, enabled: Path = _ENABLED
) -> float | None:
    """Of what this process has mapped of a file, the share that lies in large pages.

    They are up to the file system: Linux has them for XFS since 5.18, for ext4 since 6.16. None
    where memory has none either, or where the system does not tell.

    Args:
        file: Of which at least some pages have been touched.
        smaps: Where the system tells of this process's memory.
        enabled: Where it says who may have large pages.
    """
    if not (smaps.exists() and enabled.exists()) or "[never]" in enabled.read_text():
        return None
    resident = large = 0
    path = str(file.resolve())
    is_meant = False
    for line in smaps.read_text().splitlines():
        key, *values = line.split(maxsplit=5)
        if not key.endswith(":"):
            is_meant = values[-1:] == [path]
        elif is_meant and key == "Rss:":
            resident += int(values[0])
        elif is_meant and key.endswith("PmdMapped:"):
            large += int(values[0])
    return large / resident if resident else None


def keep_freed_memory() -> None:
    """Have glibc keep large arrays that were freed for the next ones of their kind.

    By default it gives each back to the system, which then has to clear its pages again: every
    intermediate result of a long step.
    """
    if not sys.platform.startswith("linux"):
        return
    libc = ctypes.CDLL(ctypes.util.find_library("c"))
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_M_MMAP_THRESHOLD, _KEPT)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT)
