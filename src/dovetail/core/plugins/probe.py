"""Probing platforms: Dovetail's own in this process, all others in child processes, in parallel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from dovetail.core.errors import ConfigError
from dovetail.core.plugins.children import Errand, ask
from dovetail.core.plugins.entries import Entry
from dovetail.core.plugins.examine import PlatformReport, broken, examine
from dovetail.core.plugins.registry import clash

__all__ = ["DEADLINE", "DEADLINE_VARIABLE", "probe_deadline", "probe_platforms"]

DEADLINE = 5.0
"""Seconds that all child processes together have, unless the variable below says otherwise."""

DEADLINE_VARIABLE = "DOVETAIL_PROBE_TIMEOUT"


def probe_deadline(environ: Mapping[str, str]) -> float:
    """The deadline in seconds. Raises ConfigError if the variable is not a positive number."""
    text = environ.get(DEADLINE_VARIABLE, "").strip()
    if not text:
        return DEADLINE
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 600:
        raise ConfigError(
            f"{DEADLINE_VARIABLE} must be a number of seconds, above 0 and at most 600,"
            f" not {text!r:.80}."
        )
    return seconds


def probe_platforms(
    entries: Iterable[Entry], environ: Mapping[str, str], *, deadline: float = DEADLINE
) -> tuple[PlatformReport, ...]:
    """Probe each entry, once; the reports come in the order of the entries.

    Names that two distributions offer are reported as broken, and neither's code is run.
    """
    chosen = tuple(entries)
    claims = Counter(entry.name for entry in chosen)
    single = [entry for entry in chosen if claims[entry.name] == 1]
    reports = _probe_children([e for e in single if not e.builtin], environ, deadline)
    reports |= {entry: examine(entry) for entry in single if entry.builtin}
    for entry in chosen:
        if claims[entry.name] > 1:
            rivals = [other for other in chosen if other.name == entry.name]
            reports[entry] = broken(entry, f"is {clash(rivals)}")
    return tuple(reports[entry] for entry in chosen)


def _probe_children(
    entries: list[Entry], environ: Mapping[str, str], deadline: float
) -> dict[Entry, PlatformReport]:
    errands = [
        Errand(question="probe", entries=(e,), deadline=deadline, remedy=DEADLINE_VARIABLE)
        for e in entries
    ]
    outcomes = zip(entries, ask(errands, environ), strict=True)
    return {
        entry: PlatformReport(**outcome.answers[0])
        if outcome.answers
        else broken(entry, outcome.complaint)
        for entry, outcome in outcomes
    }
