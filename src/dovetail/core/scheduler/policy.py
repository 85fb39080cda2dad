"""Who goes first, and who goes back: the order of requests under a policy."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from itertools import count
from typing import TypeAlias

from dovetail.core.request import Request
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.scheduler.settings import SchedulerConfig

__all__ = ["Rank", "WaitingQueue", "rank_of", "victim"]

Rank: TypeAlias = Callable[[Request], tuple[float, ...]]
"""A key that does not change while a request lives: the smallest goes first."""


def first_come(request: Request) -> tuple[float, ...]:
    """In order of arrival."""
    return request.arrival_time, request.id


def most_urgent(request: Request) -> tuple[float, ...]:
    """Smallest ``Request.priority`` first; equals by arrival."""
    return request.priority, request.arrival_time, request.id


def ageing(seconds: float) -> Rank:
    """As ``most_urgent``, but a request gains one priority for every ``seconds`` that it waits.

    All that wait age alike, so that of two requests the same one stays ahead for ever: the one
    with the smaller ``priority * seconds + arrival``. That is why no clock is needed, and why a
    request can be passed only by those that arrive less than ``seconds`` times the difference of
    their priorities after it.
    """

    def rank(request: Request) -> tuple[float, ...]:
        return request.priority * seconds + request.arrival_time, request.id

    return rank


def rank_of(config: SchedulerConfig) -> Rank:
    """The order that the settings mean."""
    if config.policy != "priority":
        return first_come
    seconds = config.priority_ageing_seconds
    return most_urgent if seconds is None else ageing(seconds)


class WaitingQueue:
    """Sequences that wait for a row. One that had a row before waits at its old place."""

    def __init__(self, rank: Rank) -> None:
        self._rank = rank
        self._heap: list[tuple[tuple[float, ...], int, Sequence]] = []
        self._here: dict[Sequence, None] = {}
        """Those that wait. The heap also holds some that were removed since."""
        self._in_heap: set[Sequence] = set()
        self._pushes = count()

    def push(self, sequence: Sequence) -> None:
        """Add a sequence."""
        self._here[sequence] = None
        if sequence not in self._in_heap:
            self._in_heap.add(sequence)
            entry = (self._rank(sequence.request), next(self._pushes), sequence)
            heapq.heappush(self._heap, entry)

    def peek(self) -> Sequence | None:
        """Whose turn it is; None if nobody waits."""
        while self._heap and self._heap[0][2] not in self._here:
            self._in_heap.remove(heapq.heappop(self._heap)[2])
        return self._heap[0][2] if self._heap else None

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is here."""
        del self._here[sequence]

    def __len__(self) -> int:
        return len(self._here)

    def __iter__(self) -> Iterator[Sequence]:
        """In no order."""
        return iter(self._here)


def victim(rows: Iterable[int], table: RowTable, rank: Rank, most_preemptions: int) -> Sequence:
    """The running sequence that goes back to the queue when blocks run out.

    One that was sent back ``most_preemptions`` times already stays while others can go. Of the
    others: the least urgent; of equals, the one that has computed the least.
    """

    def key(row: int) -> tuple[object, ...]:
        sequence = table.at(row)
        request = sequence.request
        may_go = sequence.num_preemptions < most_preemptions
        return may_go, request.priority, -int(table.num_computed[row]), rank(request)

    return table.at(max(rows, key=key))
