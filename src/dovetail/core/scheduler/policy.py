"""Who goes first, and who goes back: the order of requests under a policy."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import TypeAlias

from dovetail.core.request import Request
from dovetail.core.scheduler.sequence import Sequence

__all__ = ["Rank", "WaitingQueue", "first_come", "most_urgent", "rank_of", "victim"]

Rank: TypeAlias = Callable[[Request], tuple[float, ...]]
"""A key that does not change while a request lives: the smallest goes first."""


def first_come(request: Request) -> tuple[float, ...]:
    """In order of arrival."""
    return request.arrival_time, request.id


def most_urgent(request: Request) -> tuple[float, ...]:
    """Smallest ``Request.priority`` first; equals by arrival."""
    return request.priority, request.arrival_time, request.id


def rank_of(policy: str) -> Rank:
    """The order that a policy means: ``fcfs`` or ``priority``."""
    return most_urgent if policy == "priority" else first_come


class WaitingQueue:
    """Sequences that wait for a row. One that had a row before waits at its old place."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._heap: list[tuple[tuple[float, ...], Sequence]] = []

    def push(self, sequence: Sequence) -> None:
        """Add a sequence."""
        heapq.heappush(self._heap, (self._rank(sequence.request), sequence))

    def peek(self) -> Sequence | None:
        """Whose turn it is; None if nobody waits."""
        return self._heap[0][1] if self._heap else None

    def pop(self) -> Sequence:
        """Take out whose turn it is."""
        return heapq.heappop(self._heap)[1]

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is here."""
        self._heap = [entry for entry in self._heap if entry[1] is not sequence]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        """In no order."""
        return (sequence for _, sequence in self._heap)


def victim(running: Iterable[Sequence], rank: Rank) -> Sequence:
    """The running sequence that goes back to the queue: the last in the policy's order."""
    return max(running, key=lambda sequence: rank(sequence.request))
