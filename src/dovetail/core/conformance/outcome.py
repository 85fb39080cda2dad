"""Running checks, and what came of each."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from dovetail.core.conformance.base import Check, CheckFailedError
from dovetail.core.conformance.gaps import KnownGaps
from dovetail.core.conformance.subject import Subject
from dovetail.core.errors import DovetailError, UnsupportedError

__all__ = ["Outcome", "Status", "outcome_of", "run_checks", "stale_gaps"]

Status = Literal["pass", "fail", "unsupported", "gap"]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of one check."""

    name: str
    level: int
    statement: str
    status: Status
    """``gap``: it failed, as the known gaps say that it does."""
    reason: str = ""
    """Empty for a pass."""
    seconds: float = 0.0


def run_checks(subject: Subject, checks: Iterable[Check], gaps: KnownGaps) -> Iterator[Outcome]:
    """Run the checks one after another; none can stop those after it."""
    for check in checks:
        yield outcome_of(subject, check, gaps)


def outcome_of(subject: Subject, check: Check, gaps: KnownGaps) -> Outcome:
    """Run one check."""
    start = time.perf_counter()
    status: Status = "pass"
    reason = ""
    try:
        check.function(subject)
    except UnsupportedError as error:
        status, reason = "unsupported", _one_line(str(error))
    except Exception as error:
        status, reason = "fail", _described(error)
    known = gaps.reason(check.name)
    if known is not None and status == "fail":
        status, reason = "gap", f"{known} ({reason})"
    elif known is not None and status == "pass":
        status, reason = "fail", f"passes, but {gaps.origin} says: {known}. Remove the line"
    return Outcome(
        name=check.name,
        level=check.level,
        statement=check.statement,
        status=status,
        reason=reason,
        seconds=time.perf_counter() - start,
    )


def stale_gaps(gaps: KnownGaps, checks: Iterable[Check]) -> list[Outcome]:
    """A failure for each line of the known gaps that fits no check.

    Args:
        gaps: The lines.
        checks: All checks of the platform, also those that are not run.
    """
    names = [check.name for check in checks]
    return [
        Outcome(
            name=f"known_gaps.{pattern}",
            level=1,
            statement="Every known gap is a check's.",
            status="fail",
            reason=f"no check has this name. Remove the line from {gaps.origin}",
        )
        for pattern in gaps.unmatched(names)
    ]


def _described(error: Exception) -> str:
    if isinstance(error, CheckFailedError):
        return _one_line(str(error))
    if isinstance(error, DovetailError):
        return f"{type(error).__name__}: {_one_line(str(error))}"
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    code = (
        "" if place is None else f" (line {place.tb_lineno} of {place.tb_frame.f_code.co_filename})"
    )
    return f"{type(error).__name__}: {_one_line(str(error))}{code}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
