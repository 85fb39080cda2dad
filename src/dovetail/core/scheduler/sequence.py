"""One sequence on its way through the engine, and the queue in front of the rows."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Protocol

import numpy as np

from dovetail.core.kv.prefix import root
from dovetail.core.request import Request
from dovetail.core.types import IntArray

if TYPE_CHECKING:
    from dovetail.core.scheduler.hypotheses import Beam

__all__ = ["FirstComeQueue", "PriorityQueue", "Sequence", "WaitingQueue"]


class Sequence:
    """A request and everything the scheduler keeps for it while it waits or runs.

    While it runs, its counters and tokens live in the ``RowTable`` under ``row``; while it waits,
    ``token_ids`` holds them.

    Args:
        request: What is asked for.
        token_ids: Its tokens so far; None takes the request's prompt and what it emitted before.
    """

    def __init__(self, request: Request, token_ids: IntArray | None = None) -> None:
        self.request = request
        if token_ids is None:
            token_ids = np.array([*request.prompt_token_ids, *request.emitted], dtype=np.int32)
        self.token_ids: IntArray = token_ids
        self.num_prompt_tokens = len(request.prompt_token_ids)
        self.row: int | None = None
        self.blocks: list[int] = []
        """KV blocks held, in order of position. Not empty while waiting only after a fork."""
        self.num_shared_tokens = 0
        """Tokens computed in ``blocks`` when it was forked from its parent."""
        self.root = root(request.cache_salt)
        self.chain: list[bytes] = []
        """Names of its full blocks, as far as they were needed."""
        self.num_registered = 0
        """Blocks of the chain that are in the prefix index, or need not be."""
        self.num_cached_tokens: int | None = None
        """Prompt tokens found in the prefix cache when it first ran."""
        self.num_prompt_logprobs = 0
        """Positions of the prompt whose log-probabilities were sent."""
        self.children: list[Sequence] = []
        """Sequences that wait for this one's prefill, to share it."""
        self.has_started = bool(request.emitted)
        """It has its first token: nobody can share its prefill any more."""
        self.beam: Beam | None = None
        """What it stands for in a beam search."""

    @property
    def needs_known(self) -> bool:
        """Whether the host has to see each token before the next one can be chosen."""
        return self.beam is not None or bool(self.request.params.logits_processors)

    @property
    def rests(self) -> bool:
        """Whether it is a beam whose step is done, and that waits for those beside it."""
        return self.beam is not None and self.beam.candidates is not None

    @property
    def total(self) -> int:
        """Length, prompt included, at which it ends."""
        max_tokens = self.request.params.max_tokens or 0
        return self.num_prompt_tokens + max_tokens


class WaitingQueue(Protocol):
    """Sequences that wait for a row, in the order of a policy."""

    def push(self, sequence: Sequence) -> None:
        """Add a sequence that arrives."""
        ...

    def push_front(self, sequence: Sequence) -> None:
        """Put back a sequence that had a row, ahead of its equals."""
        ...

    def peek(self) -> Sequence | None:
        """Whose turn it is; None if nobody waits."""
        ...

    def pop(self) -> Sequence:
        """Take out whose turn it is."""
        ...

    def remove(self, sequence: Sequence) -> None:
        """Take out a sequence that is here."""
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence]: ...


class FirstComeQueue:
    """First come, first served."""

    def __init__(self) -> None:
        self._items: deque[Sequence] = deque()
        self.push = self._items.append
        self.push_front = self._items.appendleft
        self.pop = self._items.popleft
        self.remove = self._items.remove

    def peek(self) -> Sequence | None:
        """See ``WaitingQueue``."""
        return self._items[0] if self._items else None

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._items)


class PriorityQueue:
    """Smallest ``Request.priority`` first; equals by arrival."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, float, int, Sequence]] = []

    def push(self, sequence: Sequence) -> None:
        """See ``WaitingQueue``."""
        request = sequence.request
        heapq.heappush(self._heap, (request.priority, request.arrival_time, request.id, sequence))

    push_front = push

    def peek(self) -> Sequence | None:
        """See ``WaitingQueue``."""
        return self._heap[0][3] if self._heap else None

    def pop(self) -> Sequence:
        """See ``WaitingQueue``."""
        return heapq.heappop(self._heap)[3]

    def remove(self, sequence: Sequence) -> None:
        """See ``WaitingQueue``."""
        self._heap = [entry for entry in self._heap if entry[3] is not sequence]
        heapq.heapify(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Sequence]:
        return (entry[3] for entry in sorted(self._heap, key=lambda entry: entry[:3]))
