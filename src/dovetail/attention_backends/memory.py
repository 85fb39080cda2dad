"""Memory for KV caches."""

from __future__ import annotations

import math

import numpy as np
import torch

__all__ = ["zeros"]

_LINE = 64
"""Bytes that processors take from memory together: a tensor begins with one."""


def zeros(shape: tuple[int, ...], dtype: str, device: torch.device) -> torch.Tensor:
    """A tensor of zeros.

    On the host its pages are taken from the system only as they are written, so that a large
    cache costs neither time nor memory before it is used. ``torch.zeros`` writes them all.
    """
    kind: torch.dtype = getattr(torch, dtype)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=kind, device=device)
    size = math.prod(shape) * kind.itemsize
    pages = np.zeros(size + _LINE, np.uint8)
    start = -pages.ctypes.data % _LINE
    flat = torch.from_numpy(pages[start : start + size])
    return flat.view(kind).view(shape)
