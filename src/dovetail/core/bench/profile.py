"""Where the time of steps goes, by class of op, beside the least that the device would need.

What a class asks of the device is counted as the roofline counts it: the weights of linear layers
and norms, keys and values, operations. To these bytes come the arrays that ops were given and gave,
which may never have left a cache; so a class may read faster than memory does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from dovetail.core.bench.op_clock import OpTime, StepOps
from dovetail.core.bench.roofline import StepCost, Work
from dovetail.core.bench.steps import StepTime
from dovetail.core.contracts.platform import Rates

__all__ = ["HOST", "REST", "ClassProfile", "PhaseProfile", "Steps", "profile_phase"]

REST, HOST = "rest of the runner", "host"
"""What is not an op: inside the runner (plans, copies, what models do between ops), and outside of
it (scheduling, taking tokens in)."""

Steps = Sequence[tuple[StepTime, StepOps]]
"""Of the engine, in order: one that decodes, or all that compute a batch of prompts."""


@dataclass(frozen=True, kw_only=True)
class ClassProfile:
    """One class of ops, in one step or one batch of prompts: the mean of those in the middle."""

    name: str
    calls: float
    seconds: float
    least: Work
    """What the roofline counts."""
    num_bytes: float
    """The same bytes, and the arrays that went in and came out."""

    def read_fraction(self, rates: Rates) -> float | None:
        """Of the rate at which the device reads; None where nothing is counted."""
        if not self.num_bytes or not self.seconds:
            return None
        return self.num_bytes / self.seconds / rates.read_bytes_per_second

    def matrix_fraction(self, rates: Rates) -> float | None:
        """Of the rate at which the device multiplies; None where nothing is counted."""
        if not self.least.flops or not self.seconds:
            return None
        return self.least.flops / self.seconds / rates.matrix_flops_per_second


@dataclass(frozen=True, kw_only=True)
class PhaseProfile:
    """Steps that decode, or the steps that compute a batch of prompts. Seconds of one of them."""

    phase: str
    """``prefill`` or ``decode``."""
    batch_size: int
    input_len: int
    """Tokens of each prompt."""
    num_measured: int
    """Steps that decode, or batches of prompts, with ops timed."""
    steps_each: float
    """Engine steps in each of them."""
    plain: float
    """The median, as users have it: nothing watched."""
    watched: float
    """The median while ops are timed."""
    classes: tuple[ClassProfile, ...]
    """Longest first; ``REST`` and ``HOST`` come last."""

    @property
    def seconds(self) -> float:
        """Of all classes: near ``watched``."""
        return sum(part.seconds for part in self.classes)

    @property
    def least(self) -> Work:
        """Of all classes."""
        return sum((part.least for part in self.classes), Work())

    def as_json(self, rates: Rates | None) -> dict[str, Any]:
        """Plain values."""
        bound = None if rates is None else self.least.seconds(rates)
        return {
            "phase": self.phase,
            "batch_size": self.batch_size,
            "input_len": self.input_len,
            "num_measured": self.num_measured,
            "steps_each": self.steps_each,
            "seconds": self.seconds,
            "plain_seconds_median": self.plain,
            "watched_seconds_median": self.watched,
            "roofline_seconds": bound,
            "roofline_fraction": None if bound is None else bound / self.plain,
            "classes": [self._class_json(part, rates) for part in self.classes],
        }

    def _class_json(self, part: ClassProfile, rates: Rates | None) -> dict[str, Any]:
        return {
            "name": part.name,
            "calls": part.calls,
            "seconds": part.seconds,
            "share": part.seconds / self.seconds,
            "bytes": part.num_bytes,
            "operations": part.least.flops,
            "roofline_seconds": None if rates is None else part.least.seconds(rates),
            "read_fraction": None if rates is None else part.read_fraction(rates),
            "matrix_fraction": None if rates is None else part.matrix_fraction(rates),
        }


def profile_phase(
    phase: str,
    cost: StepCost,
    *,
    batch_size: int,
    input_len: int,
    measured: Sequence[Steps],
) -> PhaseProfile:
    """Add the steps up.

    Args:
        phase: ``prefill`` or ``decode``.
        cost: Of the model.
        batch_size: Rows.
        input_len: Tokens of each prompt.
        measured: Some with ops timed, some without.
    """
    plain = [each for each in measured if not each[0][1].is_watched]
    watched = [each for each in measured if each[0][1].is_watched]
    middle = _middle(watched)
    steps = [step for each in middle for step in each]
    count = len(middle)
    inside = sum(time.starting + time.waiting for time, _ in steps)
    outside = sum(time.host for time, _ in steps)
    ops = _sums([ops.times for _, ops in steps])
    work = _work(cost, [ops for _, ops in steps])
    names = [name for name in {**ops, **work} if name in ops or work[name] != Work()]
    parts = [_class(name, ops.get(name, OpTime()), work.get(name, Work()), count) for name in names]
    left = inside - sum(noted.seconds for noted in ops.values())
    return PhaseProfile(
        phase=phase,
        batch_size=batch_size,
        input_len=input_len,
        num_measured=len(watched),
        steps_each=len(steps) / count,
        plain=_median(plain),
        watched=_median(watched),
        classes=(
            *sorted(parts, key=lambda part: -part.seconds),
            _class(REST, OpTime(seconds=left), Work(), count),
            _class(HOST, OpTime(seconds=outside), Work(), count),
        ),
    )


def _seconds(steps: Steps) -> float:
    return sum(time.total for time, _ in steps)


def _median(measured: Sequence[Steps]) -> float:
    return median(map(_seconds, measured))


def _middle(measured: Sequence[Steps]) -> Sequence[Steps]:
    """The third in the middle by their time: one that was held up would count for many."""
    left_out = len(measured) // 3
    return sorted(measured, key=_seconds)[left_out : len(measured) - left_out]


def _class(name: str, noted: OpTime, work: Work, count: int) -> ClassProfile:
    return ClassProfile(
        name=name,
        calls=noted.calls / count,
        seconds=noted.seconds / count,
        least=Work(num_bytes=work.num_bytes / count, flops=work.flops / count),
        num_bytes=(work.num_bytes + noted.num_bytes) / count,
    )


def _sums(steps: Sequence[Mapping[str, OpTime]]) -> dict[str, OpTime]:
    found: dict[str, OpTime] = {}
    for times in steps:
        for name, noted in times.items():
            total = found.setdefault(name, OpTime())
            total.calls += noted.calls
            total.seconds += noted.seconds
            total.num_bytes += noted.num_bytes
    return found


def _work(cost: StepCost, steps: Sequence[StepOps]) -> dict[str, Work]:
    found: dict[str, Work] = {}
    for step in steps:
        asked = cost.work(step.query_lens, step.context_lens, step.num_places)
        for name, work in asked.items():
            found[name] = found.get(name, Work()) + work
    return found
