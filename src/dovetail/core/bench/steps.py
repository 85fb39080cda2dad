"""Where the time of an engine's steps goes: a runner that notes when it is called.

::

    |--- host ---| step() |--- host ---| result() |--- host ---| step() | ...
                                                  ^ a step ends

What is outside the runner is the host's: scheduling, taking tokens in, text. On a device with a
queue of its own ``step`` prepares and starts work, and ``result`` waits for it: where next to
nothing is waited for, the host holds the device up. Elsewhere ``step`` is the work itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.contracts.runner import (
    CacheSpec,
    Pending,
    Runner,
    RunnerPlan,
    WarmUp,
)

__all__ = ["MeteredRunner", "StepTime", "StepTimes"]


@dataclass(frozen=True, slots=True)
class StepTime:
    """One step, from the end of the one before it to its own. Seconds."""

    total: float
    starting: float
    """In ``Runner.step``, of whichever step."""
    waiting: float
    """In ``Pending.result``."""
    num_rows: int
    num_tokens: int

    @property
    def host(self) -> float:
        """Outside the runner."""
        return self.total - self.starting - self.waiting


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Steps in order."""

    steps: tuple[StepTime, ...]

    def summary(self) -> dict[str, float]:
        """The host's microseconds per step, and the shares of all time; empty without steps."""
        total = sum(step.total for step in self.steps)
        if not self.steps or not total:
            return {}
        host = np.array([step.host for step in self.steps])
        return {
            "num_steps": len(self.steps),
            "host_us_mean": float(host.mean() * 1e6),
            "host_us_p99": float(np.percentile(host, 99) * 1e6),
            "host_share": float(host.sum() / total),
            "starting_share": sum(step.starting for step in self.steps) / total,
            "waiting_share": sum(step.waiting for step in self.steps) / total,
        }

    def decodes(self, num_rows: int) -> list[float]:
        """Seconds of the steps that gave one token to each of so many rows, after such a step."""
        wanted = (num_rows, num_rows)
        return [
            step.total
            for before, step in zip(self.steps, self.steps[1:], strict=False)
            if (before.num_rows, before.num_tokens) == wanted
            and (step.num_rows, step.num_tokens) == wanted
        ]


class MeteredRunner:
    """Another runner with a watch: two readings of the clock per call, and nothing else.

    Args:
        runner: Does everything.
        clock: Seconds from some fixed point on.
    """

    def __init__(self, runner: Runner, clock: Callable[[], float] = time.perf_counter) -> None:
        self.runner = runner
        self.on_step: Callable[[Batch], None] | None = None
        """Told of each step before it is started; its time does not count."""
        self._clock = clock
        self.clear()

    def clear(self) -> None:
        """Forget all steps; the next one begins when it is started."""
        self._steps: list[StepTime] = []
        self._since: float | None = None
        self._starting = 0.0

    @property
    def times(self) -> StepTimes:
        """The steps that have ended since ``clear``."""
        return StepTimes(steps=tuple(self._steps))

    def step(self, batch: Batch) -> Pending:
        """See ``Runner``."""
        begin = self._clock()
        if self.on_step is not None:
            self.on_step(batch)
            told, begin = begin, self._clock()
            self._since = None if self._since is None else self._since + begin - told
        if self._since is None:
            self._since = begin
        pending = self.runner.step(batch)
        self._starting += self._clock() - begin
        return _Metered(self, pending, batch)

    def finish(self, pending: Pending, batch: Batch) -> StepOutput:
        """Wait for a step and note it."""
        begin = self._clock()
        output = pending.result()
        end = self._clock()
        since = begin if self._since is None else self._since
        taken = StepTime(end - since, self._starting, end - begin, batch.num_rows, batch.num_tokens)
        self._steps.append(taken)
        self._since, self._starting = end, 0.0
        return output

    def plan(self) -> RunnerPlan:
        """See ``Runner``."""
        return self.runner.plan()

    def load(self) -> Iterator[tuple[int, int]]:
        """See ``Runner``."""
        return self.runner.load()

    def cache_spec(self) -> CacheSpec:
        """See ``Runner``."""
        return self.runner.cache_spec()

    def allocate(self, num_blocks: int) -> None:
        """See ``Runner``."""
        self.runner.allocate(num_blocks)

    def warm_up(self) -> Iterator[WarmUp]:
        """See ``Runner``."""
        return self.runner.warm_up()

    def describe(self) -> dict[str, str]:
        """See ``Runner``."""
        return self.runner.describe()

    def close(self) -> None:
        """See ``Runner``."""
        self.runner.close()


class _Metered:
    """A step whose end is noted."""

    __slots__ = ("_batch", "_meter", "_pending")

    def __init__(self, meter: MeteredRunner, pending: Pending, batch: Batch) -> None:
        self._meter = meter
        self._pending = pending
        self._batch = batch

    def result(self) -> StepOutput:
        return self._meter.finish(self._pending, self._batch)
