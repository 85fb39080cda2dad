"""What the device does while somebody watches; next to nothing while nobody does."""

from __future__ import annotations

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


class Meter:
    """Runs programs and fetches results, and counts them for the watchers of the same thread."""

    def __init__(self) -> None:
        self._watchers: list[tuple[int, Activity]] = []

    @contextmanager
    def watch(self) -> Iterator[Activity]:
        """Programs that run are shapes; so is every compilation, whoever caused it."""
        activity, thread = Activity(), threading.get_ident()

        def compiled(event: str, duration_secs: float, **_: str | int) -> None:
            if event == _COMPILED and threading.get_ident() == thread:
                activity.shapes.add(("compilation", len(activity.shapes), duration_secs))

        entry = (thread, activity)
        self._watchers.append(entry)
        jax.monitoring.register_event_duration_secs_listener(compiled)
        try:
            yield activity
        finally:
            jax.monitoring.unregister_event_duration_listener(compiled)
            self._watchers.remove(entry)

    def run(self, name: str, program: Callable[..., Any], *args: Any) -> Any:
        """Call a compiled program. Arrays of numpy among its arguments are copied to the device."""
        for activity in self._here():
            leaves = [leaf for leaf in jax.tree.leaves(args) if hasattr(leaf, "shape")]
            activity.to_device += sum(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves)
            activity.shapes.add((name, *((leaf.shape, str(leaf.dtype)) for leaf in leaves)))
        return program(*args)

    def fetch(self, array: Array) -> np.ndarray[Any, Any]:
        """The array on the host; waits for it."""
        for activity in self._here():
            activity.to_host += 1
        return np.asarray(array)

    def _here(self) -> list[Activity]:
        if not self._watchers:
            return []
        return [a for thread, a in self._watchers if thread == threading.get_ident()]
