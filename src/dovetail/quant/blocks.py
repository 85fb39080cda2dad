"""Weights as float32 in blocks of rows that stay in a core's cache from one pass to the next."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import numpy as np

__all__ = ["SMALLEST", "Floats", "for_row_blocks"]

SMALLEST = np.finfo(np.float32).tiny
"""Scales below this are taken as 1: what they stand for becomes zero, and nothing overflows."""

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]

_ENTRIES = 1 << 18
_MOST_THREADS = 8
"""More would wait for the interpreter, which each needs between its passes over a block."""


def for_row_blocks(weight: np.ndarray[Any, Any], work: Callable[[slice, Floats], None]) -> None:
    """Call ``work(rows, values)`` for all rows of a weight (out, in), in several threads.

    Args:
        weight: Of any float dtype.
        work: Gets which rows, and a copy of them, which it may write to.
    """
    count = max(1, _ENTRIES // max(1, weight.shape[1]))
    blocks = [slice(at, min(at + count, len(weight))) for at in range(0, len(weight), count)]

    def run(rows: slice) -> None:
        work(rows, weight[rows].astype(np.float32, order="C"))

    num_threads = min(len(blocks), os.cpu_count() or 1, _MOST_THREADS)
    with ThreadPoolExecutor(max(1, num_threads)) as pool:
        for _ in pool.map(run, blocks):
            pass  # What was raised in a thread is raised here.
