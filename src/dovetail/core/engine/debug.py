"""The engine's whole state as plain data, for people who look for a fault."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import TYPE_CHECKING, Any

from dovetail.core.engine.messages import Control

if TYPE_CHECKING:
    from dovetail.core.engine.child import EngineChild
    from dovetail.core.scheduler.scheduler import Scheduler
    from dovetail.core.scheduler.sequence import Sequence

__all__ = ["StateRequests", "describe_scheduler"]

_PATIENCE_S = 5.0
_MOST_REQUESTS = 1000
"""More than these are counted, not described: the answer must not hold the engine up."""


class StateRequests:
    """Those who wait for the engine process to describe itself."""

    def __init__(self) -> None:
        self._waiting: list[asyncio.Future[dict[str, Any]]] = []

    async def ask(self, child: EngineChild | None) -> dict[str, Any] | None:
        """What the process says of itself; None if there is none, or it does not answer in time."""
        if child is None:
            return None
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting.append(answer)
        try:
            child.send(Control(name="dump"))
            return await asyncio.wait_for(answer, _PATIENCE_S)
        except TimeoutError:
            return None
        finally:
            self._waiting.remove(answer)

    def answer(self, state: dict[str, Any]) -> None:
        """The process has answered."""
        for future in self._waiting:
            if not future.done():
                future.set_result(state)


def describe_scheduler(scheduler: Scheduler) -> dict[str, Any]:
    """Queues, rows, requests, pool, steps under way and settings. Changes nothing."""
    pool, table = scheduler.pool, scheduler.table
    sequences = list(scheduler.sequences.values())
    return {
        "settings": dataclasses.asdict(scheduler.config),
        "counters": dataclasses.asdict(scheduler.stats),
        "steps_under_way": scheduler.num_under_way,
        "suspects": scheduler.num_suspects,
        "running": table.request_id[table.order].tolist(),
        "waiting": [sequence.request.id for sequence in scheduler.waiting][:_MOST_REQUESTS],
        "num_requests": len(sequences),
        "requests": [_describe(scheduler, sequence) for sequence in sequences[:_MOST_REQUESTS]],
        "pool": {
            "num_blocks": pool.num_usable,
            "num_free": pool.num_free,
            "num_cached": pool.num_cached,
            "references": {str(count): num for count, num in pool.reference_counts().items()},
        },
    }


def _describe(scheduler: Scheduler, sequence: Sequence) -> dict[str, Any]:
    """One request. Nothing of what it says: prompts and answers are the client's."""
    table, row, request = scheduler.table, sequence.row, sequence.request
    known = len(sequence.token_ids) if row is None else int(table.num_known[row])
    return {
        "id": request.id,
        "parent": request.parent,
        "priority": request.priority,
        "arrival_time": request.arrival_time,
        "row": row,
        "num_prompt_tokens": sequence.num_prompt_tokens,
        "num_known": known,
        "num_computed": 0 if row is None else int(table.num_computed[row]),
        "total": sequence.total,
        "num_cached_tokens": sequence.num_cached_tokens,
        "num_blocks": len(sequence.held),
        "num_preemptions": sequence.num_preemptions,
        "children": [child.request.id for child in sequence.children],
    }
