"""A certificate for people, and for programs."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from importlib.metadata import version
from textwrap import shorten

from dovetail.core.conformance.base import LEVELS, Check
from dovetail.core.conformance.certify import Certificate
from dovetail.core.conformance.outcome import Outcome, Status

__all__ = ["as_json", "as_text", "listing"]

_WORDS: dict[Status, str] = {
    "pass": "passed",
    "fail": "failed",
    "unsupported": "unsupported",
    "gap": "known gaps",
}
_SHOWN = 4
_REASON = 600


def as_text(certificate: Certificate) -> str:
    """Counts by group, then all that did not pass, with reasons, then the verdict."""
    lines = [f"Conformance of {certificate.platform} ({certificate.origin}) to Dovetail {_own()}\n"]
    lines += _groups(certificate.outcomes)
    lines += _unsupported(certificate.outcomes)
    lines += _explained(certificate.outcomes, "gap", "Known gaps")
    lines += _explained(certificate.outcomes, "fail", "Failed")
    seconds = sum(outcome.seconds for outcome in certificate.outcomes)
    lines += ["", f"{_counts(certificate.outcomes)}, in {seconds:.0f} s"]
    return "\n".join([*lines, *_verdicts(certificate)])


def as_json(certificate: Certificate) -> str:
    """Everything, as one JSON object."""
    found = {
        "platform": certificate.platform,
        "origin": certificate.origin,
        "dovetail": _own(),
        "passed": certificate.passed,
        "complete": certificate.complete,
        "levels": {str(level): good for level, good in certificate.verdicts().items()},
        "counts": dict(Counter(outcome.status for outcome in certificate.outcomes)),
        "checks": [asdict(outcome) for outcome in certificate.outcomes],
    }
    return json.dumps(found, indent=2)


def listing(checks: Sequence[Check]) -> str:
    """Names, levels and statements."""
    width = max(len(check.name) for check in checks)
    return "\n".join(f"{c.level}  {c.name:<{width}}  {c.statement}" for c in checks)


def _own() -> str:
    return version("dovetail")


def _counts(outcomes: Iterable[Outcome]) -> str:
    counts = Counter(outcome.status for outcome in outcomes)
    return ", ".join(
        f"{counts[status]} {word}" for status, word in _WORDS.items() if counts[status]
    )


def _groups(outcomes: Sequence[Outcome]) -> Iterator[str]:
    groups: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        groups.setdefault(outcome.name.partition(".")[0], []).append(outcome)
    for name, members in groups.items():
        seconds = sum(outcome.seconds for outcome in members)
        yield f"  {name:<12} {_counts(members):<48} {seconds:6.1f} s"


def _unsupported(outcomes: Sequence[Outcome]) -> Iterator[str]:
    """By reason, for one reason often stands for many checks."""
    reasons: dict[str, list[str]] = {}
    for outcome in outcomes:
        if outcome.status == "unsupported":
            reasons.setdefault(outcome.reason, []).append(outcome.name)
    if reasons:
        yield "\nUnsupported, as the platform says itself"
    for reason, names in reasons.items():
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        yield f"  {reason}"
        yield f"      {', '.join(names[:_SHOWN])}{more}"


def _explained(outcomes: Sequence[Outcome], status: str, title: str) -> Iterator[str]:
    """By reason: one slip often fails many checks."""
    reasons: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.status == status:
            reasons.setdefault(outcome.reason, []).append(outcome)
    if reasons:
        yield f"\n{title}"
    for reason, members in reasons.items():
        for outcome in members:
            yield f"  {outcome.name}: {outcome.statement}"
        yield f"      {shorten(reason, _REASON, placeholder=' ... (--json has all of it)')}"


def _verdicts(certificate: Certificate) -> Iterator[str]:
    if not certificate.complete:
        yield "Only some checks were run: this certifies nothing."
        return
    for level, good in certificate.verdicts().items():
        nothing = "" if certificate.count("pass", level) else " (nothing passed)"
        verdict = "passed" if good else f"not passed{nothing}"
        yield f"Level {level}, {LEVELS[level]}: {verdict}"
