"""Matrix units: from how many rows on they are faster than vectors, found by trying."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from dovetail_cpu.integers import Int8Panels
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.linear import PanelLinear
from dovetail_cpu.memory import HugePages

__all__ = ["has_matrix_units", "use_matrix_units"]

_OF_PAIRS = "_ZN2at6native7cpublas6brgemmEllllllbPKN3c108BFloat16ES5_Pfb"
_OF_FOURS = "_ZN2at6native7cpublas6brgemmEllllllbPKhPKaPib"
_RELEASE = "_ZN2at6native7cpublas14brgemm_releaseEb"
"""``at::native::cpublas`` in ATen/native/CPUBlas.h: brgemm of bf16, of bytes, brgemm_release."""
_TRIED = (4, 8, 16, 32, 64)
_NEVER = 1 << 40
_SHAPE = (2048, 1024)
"""Outputs and inputs of the layer that is tried."""
_REPEATS = 5


def has_matrix_units() -> bool:
    """Whether this processor has AMX and this process may use it."""
    return bool(torch.cpu._is_amx_tile_supported())


@cache
def use_matrix_units(kernels: Kernels) -> str:
    """Have the kernels use them where they win; returns what was decided, for the user."""
    symbols = _symbols()
    if symbols is None:
        return "this torch does not offer its matrix products"
    pairs, fours, release = symbols
    memory, (outputs, inputs) = HugePages(), _SHAPE
    dense = PanelLinear(kernels, memory, torch.ones(_SHAPE, dtype=torch.bfloat16), None)
    codes = torch.ones(_SHAPE, dtype=torch.int8)
    whole = Int8Panels(kernels, memory, codes, torch.ones(outputs), None)
    least = []
    for layer in (dense, whole):

        def seconds(rows: int, from_rows: int, layer: Callable[..., object] = layer) -> float:
            kernels.use_matrices(pairs, from_rows, fours, from_rows, release)
            return _seconds(layer, torch.ones(rows, inputs, dtype=torch.bfloat16))

        least.append(_least_rows(seconds))
    kernels.use_matrices(pairs, least[0], fours, least[1], release)
    return f"matrix units from {least[0]} rows on, in 8 bits from {least[1]}"


def _least_rows(seconds: Callable[[int, int], float]) -> int:
    """The fewest rows from which on all that are tried are faster with matrix units."""
    least = _NEVER
    for rows in reversed(_TRIED):
        if seconds(rows, 1) >= seconds(rows, _NEVER):
            break
        least = rows
    return least


def _seconds(layer: Callable[..., object], x: torch.Tensor) -> float:
    best = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        layer(x)
        best = min(best, time.perf_counter() - start)
    return best


def _symbols() -> tuple[int, int, int] | None:
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    try:
        found = [getattr(library, name) for name in (_OF_PAIRS, _OF_FOURS, _RELEASE)]
    except AttributeError:
        return None
    pairs, fours, release = (ctypes.cast(f, ctypes.c_void_p).value or 0 for f in found)
    return pairs, fours, release
