"""Triton's kernels, compiled before they are needed, several at a time.

Triton compiles a kernel when it is launched for the first time, and the launch waits: a fifth of a
second to half of one for each of fifty. Where ``only_compiling`` is in force, launches compute
nothing, and what they would need is compiled by some threads; most of that time they do not hold
Python's lock.
"""

from __future__ import annotations

import os
from collections.abc import Hashable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dovetail.core.contracts.launches import instead_of_launches

__all__ = ["only_compiling"]

_MOST_THREADS = 8
"""More take turns at Python's lock."""


@contextmanager
def only_compiling(device: torch.device) -> Iterator[None]:
    """Launches of this thread compute nothing until the end, and then all are compiled.

    Results are memory as it was found, and may not be used where any number would not do.

    Args:
        device: For which they are compiled.

    Raises:
        Exception: What the compiler said of one of them, at the end.
    """
    threads = min(_MOST_THREADS, os.cpu_count() or 1)
    with ThreadPoolExecutor(threads, "compiler", partial(_use, device)) as executor:
        compilation = _Compilation(executor)
        with instead_of_launches(compilation):
            yield
    compilation.check()


def _use(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)


class _Compilation:
    """See ``Launches``."""

    def __init__(self, executor: ThreadPoolExecutor) -> None:
        self._executor = executor
        self._started: dict[Hashable, Future[object]] = {}

    def take(self, kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """See that it is compiled for a launch like this one."""
        variant = _variant(kernel, arguments, options)
        if variant not in self._started:
            # Arguments are kept until then: where they lie in memory says how they are read.
            work = partial(kernel.warmup, *arguments, grid=grid, **options)
            self._started[variant] = self._executor.submit(work)

    def check(self) -> None:
        """Raise what went wrong first, all being done."""
        for future in self._started.values():
            future.result()


def _variant(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any]) -> Hashable:
    """The same for launches that one compiled kernel serves."""
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    known = {parameter.name: parameter for parameter in kernel.params}
    return kernel, tuple(
        (name, _kind(value, known.get(name))) for name, value in sorted(given.items())
    )


def _kind(value: Any, parameter: Any) -> Hashable:
    """What of a value Triton makes a variant for; ``parameter`` None: it is an option, as warps."""
    if parameter is None or parameter.is_constexpr:
        return repr(value)
    divides = not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment)
    if isinstance(value, Tensor):
        return value.dtype, divides and value.data_ptr() % 16 == 0
    if isinstance(value, int):
        special = not parameter.do_not_specialize
        return "int", special and value == 1, divides and value % 16 == 0
    return type(value).__name__
