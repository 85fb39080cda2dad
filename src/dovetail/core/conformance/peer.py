"""One member of a group: ``python -m dovetail.core.conformance.peer NAME RANK SIZE ADDRESS``.

Writes what it found as two lines of JSON: by collective, and once a member was lost.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from dovetail.core.conformance.base import CheckFailedError, expect
from dovetail.core.conformance.numpy_ops import NUMPY_DTYPES, NumpyArray
from dovetail.core.conformance.op_checks import expect_near
from dovetail.core.conformance.shelf import Shelf
from dovetail.core.conformance.subject import Subject
from dovetail.core.contracts.communicator import Communicator
from dovetail.core.contracts.workbench import Workbench
from dovetail.core.errors import UnsupportedError

__all__ = ["COLLECTIVES", "LOST", "UNSUPPORTED", "Found", "exercise", "main", "notices"]

Found = dict[str, str]
"""What is wrong, by collective; nothing where all is right."""

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "broadcast", "barrier")
LOST = "lost_member"
UNSUPPORTED = "unsupported"
"""In what a member writes: why there are no collectives here."""

_SHAPES = ((4,), (3, 8), (2, 6, 5))
_ROUNDING = {"float32": 1e-5, "bfloat16": 2.0**-7, "float16": 2.0**-10}


def exercise(group: Communicator, bench: Workbench, dtypes: tuple[str, ...]) -> Found:
    """Every collective with several shapes, axes and dtypes; each stops at its first mistake.

    All members call the same in the same order, whatever they find.
    """
    found: Found = {}
    for name, call, want, tolerance in _calls(group, bench, dtypes):
        try:
            got = call()
            if name not in found and want is not None:
                expect_near(name, got, want, tolerance)
        except CheckFailedError as error:
            found[name] = str(error)
    try:
        group.reduce_scatter(bench.put(np.zeros((group.size + 1, 2), np.float32)), 0)
        found.setdefault("reduce_scatter", "an axis that cannot be cut evenly raised no ValueError")
    except ValueError:
        group.barrier()
    return found


Call = tuple[str, Callable[[], Any], NumpyArray | None, float]


def _calls(group: Communicator, bench: Workbench, dtypes: tuple[str, ...]) -> Iterator[Call]:
    """Name, what to call, what it has to give, and how exactly."""
    random = np.random.default_rng(5)
    for dtype in dtypes:
        for shape in _SHAPES:
            drawn = random.standard_normal((group.size, *shape)).astype(NUMPY_DTYPES[dtype])
            yield from _of_arrays(group, bench, drawn, _ROUNDING[dtype])
    yield "barrier", group.barrier, None, 0.0


def _of_arrays(
    group: Communicator, bench: Workbench, drawn: NumpyArray, rounding: float
) -> Iterator[Call]:
    """Collectives over one array of each member, ``drawn[rank]``."""
    mine, dtype = drawn[group.rank], drawn.dtype
    total = drawn.astype(np.float64).sum(0).astype(dtype)
    rounding *= group.size

    def run(call: Callable[[Any], Any], array: NumpyArray) -> Callable[[], NumpyArray]:
        def unchanged() -> NumpyArray:
            placed = bench.put(array)
            got = bench.get(call(placed))
            same = bench.get(placed).tobytes() == array.tobytes()
            expect(same, "the array that was given has changed")
            return got

        return unchanged

    yield "all_reduce", run(group.all_reduce, mine), total, rounding
    for source in range(group.size):
        yield "broadcast", run(_bound(group.broadcast, source), mine), drawn[source], 0.0
    for axis in range(mine.ndim):
        joined = np.concatenate(list(drawn), axis)
        yield "all_gather", run(_bound(group.all_gather, axis), mine), joined, 0.0
        wide = np.repeat(drawn, group.size, axis + 1)
        share = np.split(
            wide.astype(np.float64).sum(0).astype(dtype), group.size, axis
        )[group.rank]  # fmt: skip
        scatter = _bound(group.reduce_scatter, axis)
        yield "reduce_scatter", run(scatter, wide[group.rank]), share, rounding


def _bound(call: Callable[[Any, int], Any], argument: int) -> Callable[[Any], Any]:
    return lambda x: call(x, argument)


def main(arguments: list[str]) -> None:
    """Join a group, look at every collective, leave; join another, whose last member is lost."""
    name, rank, size, address = arguments[0], int(arguments[1]), int(arguments[2]), arguments[3]
    shelf = Shelf()
    subject = Subject.named(name, shelf)
    try:
        group = subject.platform.communicator(rank, size, address)
        _write(exercise(group, subject.workbench, tuple(subject.capabilities.dtypes)))
        group.close()
        group = subject.platform.communicator(rank, size, f"{address}.lost")
    except UnsupportedError as error:
        _write({UNSUPPORTED: str(error)})
        return
    finally:
        shelf.close()
    if rank == size - 1:
        os._exit(0)
    _write({} if notices(group, subject.workbench) else {LOST: "it has noticed nothing"})
    # Leaving a group that is broken may wait for ever.
    os._exit(0)


def notices(group: Communicator, bench: Workbench) -> bool:
    """Whether a collective raises when a member is gone."""
    try:
        for _ in range(3):
            bench.get(group.all_reduce(bench.put(np.ones(3, np.float32))))
    except Exception:
        return True
    return False


def _write(found: Found) -> None:
    sys.stdout.write(json.dumps(found) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
