"""The kernels of every instruction set that this processor has."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch
from dovetail_cpu.kernels import INSTRUCTION_SETS, LIBRARY, Kernels, _functions, load_kernels

__all__ = ["NAMES", "kernels_of", "random_tensor", "threads"]


def _names() -> tuple[str, ...]:
    loaded = load_kernels()
    if loaded is None:
        return ()
    if loaded.instruction_set == "generic":
        return ("generic",)
    return INSTRUCTION_SETS[INSTRUCTION_SETS.index(loaded.instruction_set) : -1]


NAMES = _names()
"""Best first; none where the library was not compiled."""


@cache
def kernels_of(name: str) -> Kernels:
    """With a tape of their own."""
    return _functions(ctypes.CDLL(str(LIBRARY)), name)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def random_tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
