"""Dtypes by name, and numpy arrays as torch tensors."""

from __future__ import annotations

import warnings
from typing import Any

import ml_dtypes
import numpy as np
import torch

from dovetail.core.errors import UnsupportedError

__all__ = ["TORCH_DTYPES", "from_numpy", "to_numpy", "torch_dtype"]

TORCH_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e8m0fnu": torch.float8_e8m0fnu,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint64": torch.uint64,
    "uint32": torch.uint32,
    "uint16": torch.uint16,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
"""torch's dtypes by the names that numpy and ml_dtypes give them."""

_CARRIERS = {1: np.uint8, 2: np.int16}
"""Integers of the same size, for dtypes that torch does not take from numpy."""


def torch_dtype(name: str) -> torch.dtype:
    """The dtype of that name. Raises UnsupportedError if torch has none."""
    if name not in TORCH_DTYPES:
        raise UnsupportedError(f"torch has no dtype {name!r}; it has {', '.join(TORCH_DTYPES)}.")
    return TORCH_DTYPES[name]


def from_numpy(array: np.ndarray[Any, Any]) -> torch.Tensor:
    """A CPU tensor over the array's own memory, strides included.

    The tensor of a read-only array, such as a view of a mapped file, must not be written to:
    torch has no read-only tensors.
    """
    wanted = torch_dtype(array.dtype.name)
    foreign = array.dtype.name.startswith(("bfloat", "float8"))
    carried = array.view(_CARRIERS[array.dtype.itemsize]) if foreign else array
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        return torch.from_numpy(carried).view(wanted)


def to_numpy(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor of any device as an array of the same dtype, ml_dtypes' included."""
    host = tensor.detach().cpu().contiguous()
    name = str(host.dtype).removeprefix("torch.")
    if not name.startswith(("bfloat", "float8")):
        return host.numpy()
    carrier = torch.uint8 if host.itemsize == 1 else torch.int16
    return host.view(carrier).numpy().view(np.dtype(getattr(ml_dtypes, name)))
