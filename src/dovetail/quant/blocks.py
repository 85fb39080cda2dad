"""Weights as float32 in blocks of rows that stay in a core's cache from one pass to the next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["SMALLEST", "row_blocks"]

SMALLEST = np.finfo(np.float32).tiny
"""Scales below this are taken as 1: what they stand for becomes zero, and nothing overflows."""
_ENTRIES = 1 << 16


def row_blocks(
    weight: np.ndarray[Any, Any],
) -> Iterator[tuple[slice, np.ndarray[Any, np.dtype[np.float32]]]]:
    """Which rows of a weight (out, in), and a copy of them, which may be written to."""
    count = max(1, _ENTRIES // max(1, weight.shape[1]))
    for start in range(0, len(weight), count):
        rows = slice(start, min(start + count, len(weight)))
        yield rows, weight[rows].astype(np.float32, order="C")
