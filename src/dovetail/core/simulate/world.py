"""One run: the engine, its device and its clients, tick by tick.

Two phases, as TigerBeetle's simulator has them: in the first anything may happen and nothing may
be wrong; then the faults stop, and every live request has to come to its end within a bound.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, cast

from dovetail.core.contracts.platform import Platform
from dovetail.core.contracts.runner import Runner, RunnerConfig
from dovetail.core.engine.core import EngineCore
from dovetail.core.errors import InjectedError, InvariantError
from dovetail.core.plugins.selection import load_platform
from dovetail.core.request import Request
from dovetail.core.sampling.oracle import TokenRule
from dovetail.core.scheduler.invariants import check_scheduler
from dovetail.core.scheduler.scheduler import Scheduler
from dovetail.core.simulate.device import Device
from dovetail.core.simulate.grammar import PlainGrammars
from dovetail.core.simulate.ledger import Ledger
from dovetail.core.simulate.workload import END_TOKEN, VOCAB_SIZE, Event, Knobs, Scenario
from dovetail.core.update import Hypothesis, Update

__all__ = ["Failure", "Outcome", "run"]

_SWEEP_EVERY = 4
"""Ticks between two looks at everything, beside those after an event."""
_PATIENCE = 50


@dataclass(frozen=True)
class Failure:
    """What went wrong, and when."""

    tick: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The end of a run."""

    failure: Failure | None
    num_steps: int
    num_preemptions: int
    trace: tuple[str, ...]
    """All that happened, line by line: the same for the same scenario, byte for byte."""


def run(scenario: Scenario) -> Outcome:
    """Play a scenario to its end, or to the first thing that is wrong."""
    world = _World(scenario.knobs)
    failure = None
    try:
        world.play(scenario.events)
        world.calm_down()
    except Exception as error:
        failure = Failure(world.tick, f"{type(error).__name__}: {error}")
        world.log(f"tick {world.tick}: {failure.message}")
    return Outcome(
        failure=failure,
        num_steps=world.num_steps,
        num_preemptions=world.num_preemptions,
        trace=tuple(world.trace),
    )


class _World:
    def __init__(self, knobs: Knobs) -> None:
        self._knobs = knobs
        rule = TokenRule(VOCAB_SIZE, END_TOKEN, knobs.end_rate)
        self._ledger = Ledger(rule, partial(_search_alone, knobs))
        self.tick = 0
        self.num_steps = 0
        self._num_earlier_preemptions = 0
        self.trace: list[str] = []
        self._start()

    @property
    def num_preemptions(self) -> int:
        return self._num_earlier_preemptions + self._scheduler.stats.num_preemptions

    def log(self, line: str) -> None:
        self.trace.append(line)

    def _start(self) -> None:
        """A new engine, as after the death of the one before."""
        self._scheduler = Scheduler(self._knobs.scheduler, PlainGrammars(VOCAB_SIZE))
        self._device = Device(
            _make_runner(self._knobs), self._scheduler, self._ledger.blame, self.log
        )
        self._engine = EngineCore(
            self._scheduler,
            cast("Runner", self._device),
            steps_ahead=self._knobs.steps_ahead,
            clock=lambda: float(self.tick),
        )

    def play(self, events: tuple[Event, ...]) -> None:
        """Phase one: safety."""
        position = 0
        while position < len(events):
            if not self._engine.has_work():
                self.tick = max(self.tick, events[position].tick)
            while position < len(events) and events[position].tick <= self.tick:
                self._apply(events[position])
                position += 1
            self._advance(must_sweep=True)

    def calm_down(self) -> None:
        """Phase two: liveness. No faults any more, and a bound on the time that is left."""
        self._device.due.clear()
        work = self._ledger.work(self._knobs.scheduler.max_num_batched_tokens)
        bound = self.tick + _PATIENCE + 4 * work
        while self._engine.has_work():
            if self.tick > bound:
                check_scheduler(self._scheduler)
                raise InvariantError("engine", f"I17: no end in sight: {self._ledger.counts()}")
            self._advance(must_sweep=False)
        self._ledger.check_over()
        check_scheduler(self._scheduler)
        self.log(f"tick {self.tick}: over: {self._ledger.counts()}")

    def _apply(self, event: Event) -> None:
        self.log(str(event))
        match event.kind:
            case "submit":
                for request in event.requests:
                    self._ledger.submit(request)
                    self._engine.add(request)
            case "abort":
                self._ledger.abort(event.target)
                self._engine.abort([event.target])
            case "die":
                self._restart()
            case "reset_cache":
                self._scheduler.pool.forget_cached()
            case fault:
                self._device.due.append((fault, event.target))

    def _restart(self) -> None:
        due = self._device.due
        self._num_earlier_preemptions = self.num_preemptions
        self._start()
        self._device.due = due
        for request in self._ledger.survivors():
            self._engine.add(request)

    def _advance(self, *, must_sweep: bool) -> None:
        """One step of the engine, and a look at what it did."""
        self.tick += 1
        if self._engine.has_work():
            self.num_steps += 1
            try:
                updates = self._engine.step()
            except InjectedError:
                self.log(f"tick {self.tick}: the engine gives up")
                self._restart()
                return
            for update in updates:
                self.log(f"  {update.id}: {update.token_ids} {update.finish_reason or ''}")
                self._ledger.take(update)
        if must_sweep or self.tick % _SWEEP_EVERY == 0:
            check_scheduler(self._scheduler)


def _search_alone(knobs: Knobs, request: Request) -> list[Hypothesis]:
    """What a beam search finds with the whole engine to itself, and more blocks than it needs."""
    config = replace(
        knobs.scheduler,
        num_blocks=2000,
        max_num_seqs=16,
        max_num_batched_tokens=128,
        speculation=None,
    )
    engine = EngineCore(Scheduler(config), _make_runner(replace(knobs, scheduler=config)))
    engine.add(request)
    updates: list[Update] = []
    while engine.has_work():
        updates += engine.step()
    return updates[-1].beams or []


@cache
def _platform() -> Platform:
    return load_platform("oracle", {})


def _make_runner(knobs: Knobs) -> Runner:
    config = knobs.scheduler
    options: dict[str, Any] = {"end_rate": knobs.end_rate, "draft_quality": knobs.draft_quality}
    runner = _platform().runner(
        RunnerConfig(
            model_path=Path(),
            hf_config={"vocab_size": VOCAB_SIZE, "eos_token_id": END_TOKEN},
            model_impl="native",
            load_format="dummy",
            dtype="float32",
            kv_dtype="float32",
            block_size=config.block_size,
            max_model_len=config.max_model_len,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            options=options,
        )
    )
    runner.allocate(config.num_blocks - 1)
    return runner
