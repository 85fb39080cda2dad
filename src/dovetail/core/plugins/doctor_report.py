"""What ``dovetail doctor`` prints."""

from __future__ import annotations

import json
import platform
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from dovetail.core.config.cache import readable_bytes
from dovetail.core.errors import DovetailError, SelectionError
from dovetail.core.machine import Machine
from dovetail.core.plugins.diagnosis import Finding
from dovetail.core.plugins.entries import ALLOW_VARIABLE
from dovetail.core.plugins.examination import Examination
from dovetail.core.plugins.health import GROUPS, EntryReport, kind_of
from dovetail.core.plugins.report import platforms_json, platforms_table
from dovetail.core.plugins.selection import Selection

__all__ = ["doctor_json", "doctor_text"]

_MARKS = {"fine": "+", "kept out": "-", "not reached": "?", "claimed twice": "!", "broken": "!"}
_WHY = {
    "kept out": f" ({ALLOW_VARIABLE} does not name it)",
    "not reached": " (not examined: one before it took too long)",
}
_NAMES_SHOWN = 12
_WIDTH, _INDENT = 100, 11


def doctor_text(examination: Examination, findings: Sequence[Finding]) -> str:
    """For people, without a final newline."""
    parts = [
        "\n".join(_wrapped(topic, line) for topic, line in _surroundings(examination)),
        platforms_table(examination.platforms, _choice(examination)),
        "\n".join(_started(examination)),
        *_sections(examination.entries),
        _verdict(findings),
    ]
    return "\n\n".join(part for part in parts if part)


def doctor_json(examination: Examination, findings: Sequence[Finding]) -> str:
    """The same for programs."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "packages": examination.versions,
        "machine": asdict(examination.machine),
        "variables": examination.variables,
        "folders": examination.folders,
        **json.loads(platforms_json(examination.platforms, _choice(examination))),
        "start": None if examination.start is None else asdict(examination.start),
        "entries": [asdict(report) for report in examination.entries],
        "kept_out": [asdict(entry) for entry in examination.kept_out],
        "findings": [asdict(finding) for finding in findings],
    }
    return json.dumps(found, indent=2)


def _choice(examination: Examination) -> Selection | DovetailError:
    return examination.selection or SelectionError(examination.selection_error)


def _surroundings(examination: Examination) -> Iterator[tuple[str, str]]:
    versions = dict(examination.versions)
    yield "dovetail", f"{versions.pop('dovetail', 'unknown')}, Python {platform.python_version()}"
    yield "system", examination.machine.system
    yield "processor", _cores(examination.machine)
    yield "memory", _memory(examination.machine)
    yield "packages", ", ".join(f"{name} {version}" for name, version in versions.items())
    for topic, values in (
        ("threads", examination.machine.threads),
        ("variables", examination.variables),
    ):
        if values:
            yield topic, " ".join(f"{name}={value}" for name, value in values.items())
    yield "folders", ", ".join(f"{name} {bad}".strip() for name, bad in examination.folders.items())


def _wrapped(topic: str, line: str) -> str:
    first = f"{topic + ':':<{_INDENT}}"
    return textwrap.fill(
        line, _WIDTH, initial_indent=first, subsequent_indent=" " * _INDENT, break_on_hyphens=False
    )


def _cores(machine: Machine) -> str:
    quota = "" if machine.core_quota is None else f", at most {machine.core_quota:g} at a time"
    usable, total = machine.num_processors, machine.num_processors_total
    share = f"{usable} of {total}" if usable < total else f"{total}"
    nodes = f" on {machine.num_nodes} NUMA nodes" if machine.num_nodes > 1 else ""
    return f"{machine.processor}, {machine.num_cores} cores{nodes}, {share} threads{quota}"


def _memory(machine: Machine) -> str:
    text = f"{readable_bytes(machine.memory_free)} free of {readable_bytes(machine.memory_total)}"
    if machine.memory_limit is None:
        return text
    return f"{text}, {readable_bytes(machine.memory_limit)} allowed by the control group"


def _started(examination: Examination) -> Iterator[str]:
    """What the chosen platform says of itself, and what is kept out."""
    start = examination.start
    if start is not None and not start.error:
        memory = f"{readable_bytes(start.memory_free)} of {readable_bytes(start.memory_total)}"
        yield f"It starts: {', '.join(start.devices)}, {memory} free"
        for topic in ("dtypes", "attention", "features"):
            yield f"  {topic:<11}{', '.join(getattr(start, topic)) or 'none'}"
    elif start is not None:
        yield f"It does not start: {start.error}"
    for entry in examination.kept_out:
        yield f"Kept out: {entry.name} ({entry.origin}); {ALLOW_VARIABLE} does not name it"


def _sections(reports: Sequence[EntryReport]) -> Iterator[str]:
    """One block for each group that has entries."""
    for group in dict.fromkeys([*GROUPS, *(report.group for report in reports)]):
        members = [report for report in reports if report.group == group]
        if members:
            lines = (line for state in _MARKS for line in _state_lines(state, members))
            yield "\n".join([_title(group), *lines])


def _title(group: str) -> str:
    kind = kind_of(group)
    family = group.removeprefix(kind).removeprefix(".")
    return f"{GROUPS.get(kind, group)}s" + (f" for {family}" if family else "")


def _state_lines(state: str, members: Sequence[EntryReport]) -> Iterator[str]:
    """Sound ones share a line for each package; each broken one has its own."""
    chosen = [report for report in members if report.state == state]
    if _MARKS[state] == "!":
        for report in chosen:
            yield f"!  {report.name} ({report.origin}, {report.value}): {report.reason}"
        return
    for origin, group in groupby(chosen, key=lambda report: report.origin):
        names = [report.name for report in group]
        more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
        shown = ", ".join(names[:_NAMES_SHOWN])
        yield f"{_MARKS[state]}  {shown}{more}  {origin}{_WHY.get(state, '')}"


def _verdict(findings: Sequence[Finding]) -> str:
    if not findings:
        return "No problem was found."
    serious = sum(finding.serious for finding in findings)
    count = f"{len(findings)} problem{'s' if len(findings) > 1 else ''}"
    lines = [f"{count}, {serious or 'none'} of which stands in the way:"]
    for finding in findings:
        lines += [f"{'!' if finding.serious else '-'}  {finding.what}", f"   {finding.remedy}"]
    return "\n".join(lines)
