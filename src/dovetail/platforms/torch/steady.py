"""Elementwise functions whose result for a number does not depend on where it stands.

Torch computes a run of numbers with vector instructions and what is left at its end with the
scalar library, and the two may differ in the last bit. A thread gets one run. Here every run is a
multiple of the vectors' length, so that nothing is left.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["steady"]

_UNIT = 64
"""A multiple of what one round of any vector loop takes."""
_ALONE = 16384 // _UNIT
"""Units that torch never shares out among threads (gelu begins to earlier than others)."""
_SHARED = 32768 // _UNIT
"""Units per thread from which on it always uses all threads (``at::internal::GRAIN_SIZE``)."""


def steady(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``function(x)`` for an elementwise function; x has any shape and dtype."""
    width = x.shape[-1]
    if width % _UNIT:
        padded = functional.pad(x, (0, -width % _UNIT))
        return steady(function, padded)[..., :width].contiguous()
    units = x.reshape(-1, _UNIT)
    out = [function(run) for run in torch.split(units, _runs(len(units)))]
    return (out[0] if len(out) == 1 else torch.cat(out)).view(x.shape)


def _runs(num_units: int) -> list[int]:
    """Units per call, such that all threads get whole units."""
    threads = torch.get_num_threads()
    if num_units <= _ALONE or threads == 1:
        return [num_units]
    shared = num_units - num_units % threads
    if shared > (threads - 1) * _SHARED:
        rest = [num_units - shared] if shared < num_units else []
        return [shared, *rest]
    return [min(_ALONE, num_units - start) for start in range(0, num_units, _ALONE)]
