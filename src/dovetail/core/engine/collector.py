"""Python's garbage collector in a process that steps an engine."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["calm", "paused", "settle"]

_YOUNG = 20_000
"""Containers between two collections. A step of 1024 requests makes a few thousand, all of which
go by reference counts; the default of 700 looks at them several times a step for nothing."""


@contextmanager
def paused() -> Iterator[None]:
    """No cycles are looked for meanwhile: what is imported and loaded stays, and it is much."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def settle() -> None:
    """What has been loaded stays; from now on cycles are looked for rarely."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, 10, 10)


@contextmanager
def calm() -> Iterator[None]:
    """As ``settle``, in a process that belongs to somebody else: for a while, and all is put back.

    Nothing is frozen where somebody else has frozen something.
    """
    thresholds, freezes = gc.get_threshold(), not gc.get_freeze_count()
    if freezes:
        gc.freeze()
    gc.set_threshold(_YOUNG, 10, 10)
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        if freezes:
            gc.unfreeze()
