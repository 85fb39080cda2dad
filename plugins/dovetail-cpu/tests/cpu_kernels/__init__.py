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
    if load_kernels() is None:
        return ()
    library = ctypes.CDLL(str(LIBRARY))
    library.instruction_set.restype = ctypes.c_char_p
    best = library.instruction_set().decode()
    return INSTRUCTION_SETS[INSTRUCTION_SETS.index(best) :][: None if best == "generic" else -1]


NAMES = _names()
"""Best first, whichever is chosen; none where the library was not compiled, or is off."""


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
