"""The engine proper: a scheduler, a runner, and the loop between them."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable

from dovetail.core.batch import Batch
from dovetail.core.contracts.runner import Pending, Runner
from dovetail.core.engine.api import EngineStats
from dovetail.core.errors import DovetailError
from dovetail.core.request import Request
from dovetail.core.scheduler.scheduler import Scheduler
from dovetail.core.speculative.speculation import SpeculationStats
from dovetail.core.update import Update

__all__ = ["EngineCore"]

_log = logging.getLogger(__name__)
_FAILURES_IN_A_ROW = 8


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

    def add(self, request: Request) -> None:
        """Take up a request, validated by the front end."""
        self.scheduler.add(request)

    def abort(self, ids: list[int]) -> None:
        """Forget requests; ids that are not here are ignored."""
        self.scheduler.abort(ids)

    def has_work(self) -> bool:
        """Whether ``step`` has anything to do."""
        return bool(self._under_way) or self.scheduler.has_work()

    def step(self) -> list[Update]:
        """Start the next step, finish the oldest one that is due, and say what it produced."""
        if not self._under_way:
            self._since = self._clock()
        batch = self.scheduler.schedule()
        try:
            if batch is not None:
                self._under_way.append((batch, self.runner.step(batch)))
            if not self._under_way or (batch and len(self._under_way) <= self.steps_ahead):
                return []
            batch, pending = self._under_way.popleft()
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
            Exception: The error itself, once steps have failed again and again: then it is not
                a request's fault, and the process is better replaced.
        """
        self._failures += 1
        if batch is None or self._failures > _FAILURES_IN_A_ROW:
            raise error
        _log.exception("step %d failed; its %d requests run alone", batch.step, batch.num_rows)
        self._under_way.clear()
        text = str(error) if isinstance(error, DovetailError) else type(error).__name__
        return self.scheduler.step_failed(batch, f"the engine failed on this request: {text}")

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
