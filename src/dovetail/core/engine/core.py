"""The engine proper: a scheduler, a runner, and the loop between them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from dovetail.core.batch import Batch
from dovetail.core.contracts.runner import Pending, Runner
from dovetail.core.engine.api import EngineStats
from dovetail.core.errors import DovetailError, InvariantError
from dovetail.core.faults import fault
from dovetail.core.request import Request
from dovetail.core.scheduler.invariants import check_scheduler
from dovetail.core.scheduler.scheduler import Scheduler
from dovetail.core.speculative.speculation import SpeculationStats
from dovetail.core.update import Update

__all__ = ["EngineCore"]

_log = logging.getLogger(__name__)
_FAILURES_IN_A_ROW = 8
_IDLE_STEPS = 3
"""Steps in a row that do nothing while rows are taken and nothing is under way: a lost wake-up."""


class EngineCore:
    """Takes requests, gives updates, one step at a time. Belongs to one thread.

    Args:
        scheduler: Decides the steps; nothing else may call it.
        runner: Loaded, allocated and warm.
        steps_ahead: Steps that may be under way when the next one is prepared: 0 or 1.
        clock: Seconds from some fixed point on.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        steps_ahead: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.steps_ahead = steps_ahead
        self._under_way: deque[tuple[Batch, Pending]] = deque()
        self._failures = 0
        self._clock = clock
        self._since = 0.0
        """When the oldest step under way began, or the one before it was over."""
        self._idle_steps = 0
        self._refused: list[Update] = []
        """Requests that could not be taken up; told with the next step."""

    def add(self, request: Request) -> None:
        """Take up a request, validated by the front end. If that raises, it alone has failed."""
        try:
            fault("scheduler.admit", request.id)
            self.scheduler.add(request)
        except Exception as error:
            if isinstance(error, InvariantError) and error.scope != "request":
                raise
            _log.exception("request %d could not be taken up", request.id)
            self._refused.append(
                Update(id=request.id, token_ids=[], finish_reason="error", error=_reason(error))
            )

    def abort(self, ids: list[int]) -> None:
        """Forget requests; ids that are not here are ignored."""
        self.scheduler.abort(ids)

    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._under_way or self._refused) or self.scheduler.has_work()

    def step(self) -> list[Update]:
        """Start the next step, finish the oldest one that is due, and say what it produced."""
        if self._refused:
            refused, self._refused = self._refused, []
            return refused
        if not self._under_way:
            self._since = self._clock()
        batch = self.scheduler.schedule()
        self._watch(batch)
        try:
            if batch is not None:
                fault("runner.step")
                self._under_way.append((batch, self.runner.step(batch)))
            if not self._under_way or (batch and len(self._under_way) <= self.steps_ahead):
                return []
            batch, pending = self._under_way.popleft()
            fault("runner.result")
            output = pending.result()
        except Exception as error:
            return self._recover(batch, error)
        self._failures = 0
        now = self._clock()
        seconds, self._since = now - self._since, now
        return self.scheduler.update(batch, output, seconds)

    def _recover(self, batch: Batch | None, error: Exception) -> list[Update]:
        """A step raised: find out whose fault it was, and let everybody else go on.

        Raises:
            InvariantError: The state of the engine is wrong, not a request.
            Exception: The error itself, once steps have failed again and again: then it is not
                a request's fault, and the process is better replaced.
        """
        if isinstance(error, InvariantError) and error.scope != "request":
            raise error
        self._failures += 1
        if batch is None or self._failures > _FAILURES_IN_A_ROW:
            raise error
        _log.exception("step %d failed; its %d requests run alone", batch.step, batch.num_rows)
        self._under_way.clear()
        return self.scheduler.step_failed(batch, _reason(error))

    def _watch(self, batch: Batch | None) -> None:
        """Where rows are taken and all is known, there is always a next step."""
        if batch is not None or self._under_way or not self.scheduler.num_running:
            self._idle_steps = 0
            return
        self._idle_steps += 1
        if self._idle_steps >= _IDLE_STEPS:
            running = self.scheduler.num_running
            raise InvariantError("engine", f"I17: {running} requests have rows, none gets a step")

    def sweep(self) -> None:
        """Look at everything. Raises InvariantError if the engine's state is wrong."""
        check_scheduler(self.scheduler)

    def stats(self) -> EngineStats:
        """Gauges and counters now."""
        scheduler, counters = self.scheduler, self.scheduler.stats
        guesses = scheduler.speculation.stats if scheduler.speculation else SpeculationStats()
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            num_blocks=scheduler.pool.num_usable,
            num_free_blocks=scheduler.pool.num_free,
            block_size=scheduler.config.block_size,
            num_steps=counters.num_steps,
            num_prompt_tokens=counters.num_prompt_tokens,
            num_generation_tokens=counters.num_generation_tokens,
            num_preemptions=counters.num_preemptions,
            prefix_cache_queries=counters.prefix_cache_queries,
            prefix_cache_hits=counters.prefix_cache_hits,
            num_drafts=guesses.num_drafts,
            num_draft_tokens=guesses.num_draft_tokens,
            num_accepted_tokens=guesses.num_accepted_tokens,
        )

    def close(self) -> None:
        """Give the device's memory back."""
        self._under_way.clear()
        self.runner.close()


def _reason(error: Exception) -> str:
    text = str(error) if isinstance(error, DovetailError) else type(error).__name__
    return f"the engine failed on this request: {text}"
