"""A queue in which nobody waits behind a sequence whose grammar is still being compiled."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from dovetail.core.scheduler.policy import WaitingQueue
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.structured.base import Grammars

__all__ = ["PreparedQueue"]

_REST_S = 0.002
"""How long to wait for a grammar when there is nothing else to do; messages wait as long."""


class PreparedQueue:
    """A queue, with those who are not ready kept beside it.

    Args:
        queue: In the order of a policy.
        grammars: Says who is ready.
    """

    def __init__(self, queue: WaitingQueue, grammars: Grammars) -> None:
        self._queue = queue
        self._grammars = grammars
        self._unready: list[Sequence] = []

    def push(self, sequence: Sequence) -> None:
        """See ``WaitingQueue``."""
        if self._is_ready(sequence):
            self._queue.push(sequence)

    def peek(self) -> Sequence | None:
        """See ``WaitingQueue``. Those who have become ready line up first, in their order."""
        if self._unready:
            sequences, self._unready = self._unready, []
            for sequence in sequences:
                self.push(sequence)
        return self._queue.peek()

    def remove(self, sequence: Sequence) -> None:
        """See ``WaitingQueue``."""
        if sequence in self._unready:
            self._unready.remove(sequence)
        else:
            self._queue.remove(sequence)

    def rest(self) -> None:
        """There is nothing to do: give those who are not ready a moment, if there are any."""
        if self._unready:
            self._grammars.wait(_REST_S)

    def __len__(self) -> int:
        return len(self._queue) + len(self._unready)

    def __iter__(self) -> Iterator[Sequence]:
        return chain(self._queue, self._unready)

    def _is_ready(self, sequence: Sequence) -> bool:
        """Whether it can run; if not, it is kept here."""
        if not sequence.request.grammar or self._grammars.prepare(sequence.request):
            return True
        self._unready.append(sequence)
        return False
