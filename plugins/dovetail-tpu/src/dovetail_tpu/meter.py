"""What the device does while somebody watches; next to nothing while nobody does."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax import Array

from dovetail.core.contracts.workbench import Activity

__all__ = ["Meter"]

_COMPILED = "/jax/core/compile/backend_compile_duration"


class Meter(threading.local):
    """Counts programs and copies for the watchers of the same thread."""

    def __init__(self) -> None:
        self._watchers: list[Activity] = []

    @contextmanager
    def watch(self) -> Iterator[Activity]:
        """Programs that run are shapes; so is every compilation, whoever caused it."""
        self._watchers.append(Activity())
        try:
            yield self._watchers[-1]
        finally:
            self._watchers.pop()

    def compiled(self, event: str, duration_secs: float, **_: str | int) -> None:
        """Listens to JAX, which calls in the thread that compiles."""
        for activity in self._watchers if event == _COMPILED else ():
            activity.shapes.add(("compilation", len(activity.shapes), duration_secs))

    def counted(self, name: str, program: Callable[..., Any]) -> Callable[..., Any]:
        """The program. Arrays of numpy among its arguments are copied to the device."""

        @functools.wraps(program)
        def run(*args: Any) -> Any:
            for activity in self._watchers:
                leaves = [leaf for leaf in jax.tree.leaves(args) if hasattr(leaf, "shape")]
                activity.to_device += sum(isinstance(leaf, np.ndarray) for leaf in leaves)
                activity.shapes.add((name, *((leaf.shape, str(leaf.dtype)) for leaf in leaves)))
            return program(*args)

        return run

    def fetch(self, array: Array) -> np.ndarray[Any, Any]:
        """The array on the host; waits for it."""
        for activity in self._watchers:
            activity.to_host += 1
        return np.asarray(array)
