"""The collectives contract: how the devices that share a model exchange arrays."""

from __future__ import annotations

from typing import Protocol

from dovetail.core.types import Array

__all__ = ["Communicator"]


class Communicator(Protocol):
    """One member of a group of ``size`` processes, each with a device of its own.

    Every member calls the same methods in the same order, with arrays of the same shape and dtype.
    Results are new arrays on the member's device; nothing is changed in place. Sums of 16-bit
    floats may be taken in any order and rounded after each addition.
    """

    rank: int
    size: int

    def all_reduce(self, x: Array) -> Array:
        """The sum over all members, on each of them."""
        ...

    def all_gather(self, x: Array, axis: int) -> Array:
        """The members' arrays one after another along ``axis``, in order of rank, on each."""
        ...

    def reduce_scatter(self, x: Array, axis: int) -> Array:
        """The member's own share, in order of rank, of the sum cut into ``size`` along ``axis``.

        Raises ValueError if the axis cannot be cut evenly.
        """
        ...

    def broadcast(self, x: Array, source: int) -> Array:
        """The array of member ``source``, on each."""
        ...

    def barrier(self) -> None:
        """Return when every member has called it."""
        ...

    def close(self) -> None:
        """Leave the group."""
        ...
