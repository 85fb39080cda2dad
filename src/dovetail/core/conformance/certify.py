"""One run of the kit over one platform: which checks, what came of them, and what that means."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dovetail.core.conformance.base import LEVELS, Check
from dovetail.core.conformance.catalogue import catalogue, chosen
from dovetail.core.conformance.gaps import KnownGaps
from dovetail.core.conformance.outcome import Outcome, Status, run_checks, stale_gaps
from dovetail.core.conformance.subject import Subject
from dovetail.core.errors import ConfigError

__all__ = ["Certificate", "Plan", "certify", "plan_checks"]

Progress = Callable[[int, int, str], None]
"""Told how many checks are done, of how many, and what the next one is."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is going to be run."""

    checks: Sequence[Check]
    gaps: KnownGaps
    stale: Sequence[Outcome]
    """Failures for lines of the known gaps that fit no check."""


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What came of a run."""

    platform: str
    origin: str
    """Package and version of the plug-in."""
    outcomes: Sequence[Outcome]
    complete: bool
    """All checks of the levels were run, not only some that were named."""

    @property
    def passed(self) -> bool:
        """Nothing has failed, and something has passed."""
        return not self.count("fail") and self.count("pass") > 0

    def count(self, status: Status, level: int | None = None) -> int:
        """How many outcomes have this status, on one level or on all."""
        return sum(o.status == status and level in (None, o.level) for o in self.outcomes)

    def verdicts(self) -> dict[int, bool]:
        """Of each level that was run: whether it, and those before it, passed.

        A level on which nothing passed is not passed: all of it being unsupported proves nothing.
        """
        verdicts: dict[int, bool] = {}
        for level in LEVELS:
            if any(outcome.level == level for outcome in self.outcomes):
                good = self.count("pass", level) > 0 and not self.count("fail", level)
                verdicts[level] = good and all(verdicts.values())
        return verdicts


def plan_checks(
    subject: Subject,
    *,
    level: int = 3,
    only: Sequence[str] = (),
    known_gaps: Path | None = None,
    share: tuple[int, int] = (1, 1),
) -> Plan:
    """The checks to run.

    Args:
        subject: The platform.
        level: The highest of ``LEVELS`` to look at.
        only: Patterns of names; empty means all.
        known_gaps: A file in place of the one that the plug-in ships.
        share: Which of how many shares of these checks.

    Raises:
        ConfigError: The file cannot be read, no check has a name that was asked for, or there are
            fewer checks than shares.
    """
    gaps = KnownGaps.of(subject.entry) if known_gaps is None else KnownGaps.read(known_gaps)
    listed = catalogue(subject, level)
    checks = chosen(listed, only)
    if not checks:
        raise ConfigError(
            f"No check up to level {level} is called {' or '.join(only)}; --list shows them all."
        )
    number, count = share
    mine = checks[number - 1 :: count]
    if not mine:
        raise ConfigError(f"There are {len(checks)} such checks, too few for {count} shares.")
    stale = stale_gaps(gaps, catalogue(subject)) if gaps.lines and number == 1 else []
    return Plan(checks=mine, gaps=gaps, stale=stale)


def certify(subject: Subject, plan: Plan, progress: Progress, *, complete: bool) -> Certificate:
    """Run the checks. Whatever a platform does short of ending the process becomes an outcome."""
    outcomes = list(plan.stale)
    results = run_checks(subject, plan.checks, plan.gaps)
    for done, check in enumerate(plan.checks):
        progress(done, len(plan.checks), check.name)
        outcomes.append(next(results))
    return Certificate(
        platform=subject.name, origin=subject.entry.origin, outcomes=outcomes, complete=complete
    )
