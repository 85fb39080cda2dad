"""Memory for KV caches."""

from __future__ import annotations

import math

import numpy as np
import torch

__all__ = ["zeros"]


def zeros(shape: tuple[int, ...], dtype: str, device: torch.device) -> torch.Tensor:
    """A tensor of zeros.

    On the host its pages are taken from the system only as they are written, so that a large
    cache costs neither time nor memory before it is used. ``torch.zeros`` writes them all.
    """
    kind: torch.dtype = getattr(torch, dtype)
    if device.type != "cpu":
        return torch.zeros(shape, dtype=kind, device=device)
    flat = torch.from_numpy(np.zeros(math.prod(shape) * kind.itemsize, np.uint8))
    return flat.view(kind).view(shape)
