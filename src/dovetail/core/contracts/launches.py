"""How kernels are launched, so that a platform can have them compiled before they are needed.

A kernel is anything that ``kernel[grid](*arguments, **options)`` launches, and that is compiled
when it is launched for the first time, as those of Triton are. Whoever launches one says
``launcher``; attention backends and ops are thereby compiled by the same means without knowing of
each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, Protocol

__all__ = ["Launches", "instead_of_launches", "launcher"]


class Launches(Protocol):
    """Takes launches."""

    def take(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """One launch. It may be left out: then its results are memory as it was found."""
        ...


_taking: ContextVar[Launches | None] = ContextVar("_taking", default=None)


def launcher(kernel: Any, grid: tuple[int, ...]) -> Callable[..., object]:
    """What is called with the arguments and options of a launch."""
    taking = _taking.get()
    return kernel[grid] if taking is None else partial(taking.take, kernel, grid)


@contextmanager
def instead_of_launches(taking: Launches) -> Iterator[None]:
    """Until the end, launches of this thread are taken, and nothing is launched."""
    token = _taking.set(taking)
    try:
        yield
    finally:
        _taking.reset(token)
