"""From what was found to what is wrong and what to do about it. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from dovetail.core.plugins.attention import ATTENTION_GROUP
from dovetail.core.plugins.entries import ALLOW_VARIABLE
from dovetail.core.plugins.examination import Examination
from dovetail.core.plugins.examine import PLATFORM_GROUP, PlatformReport
from dovetail.core.plugins.health import GROUPS, EntryReport, kind_of
from dovetail.core.plugins.hooks import HOOK_GROUP
from dovetail.core.plugins.registry import nearest

__all__ = ["ATTENTION_VARIABLE", "Finding", "diagnose"]

ATTENTION_VARIABLE = "DOVETAIL_ATTENTION_BACKEND"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that is wrong."""

    what: str
    """One line."""
    remedy: str
    """What to do about it, in one line."""
    serious: bool
    """It stands in the way of what was asked for, or of every start."""


def diagnose(examination: Examination) -> tuple[Finding, ...]:
    """Everything that is wrong, the serious first."""
    found = [
        *_of_choice(examination),
        *_of_start(examination),
        *_of_variables(examination),
        *_of_packages(examination),
        *_of_clashes(examination),
        *(_of_platform(report) for report in _broken_platforms(examination)),
        *(_of_entry(report, examination) for report in _broken_entries(examination)),
        *(
            Finding(
                what=f"{folder} {wrong}",
                remedy="set the variable that is named there",
                serious=False,
            )
            for folder, wrong in _folders(examination)
        ),
    ]
    return tuple(sorted(found, key=lambda finding: not finding.serious))


def _of_choice(examination: Examination) -> Iterator[Finding]:
    if examination.selection is None:
        yield Finding(
            what=f"no platform can be chosen: {_line(examination.selection_error)}",
            remedy="do as it says, or name another platform with --device",
            serious=True,
        )


def _of_start(examination: Examination) -> Iterator[Finding]:
    start = examination.start
    if start is None:
        return
    if start.error:
        origins = [r.origin for r in examination.platforms if r.name == start.name]
        yield Finding(
            what=f"platform {start.name} ({', '.join(origins)}) does not start: {start.error}",
            remedy="mend or update the package, or name another platform with --device",
            serious=True,
        )
        return
    wanted = examination.variables.get(ATTENTION_VARIABLE)
    told = [report.name for report in _broken_entries(examination)]
    if wanted and wanted not in [*start.attention, *told]:
        known = ", ".join(nearest(wanted, start.attention)) or "none"
        yield Finding(
            what=f"{ATTENTION_VARIABLE}={wanted}: platform {start.name} has {known}",
            remedy="name one of these, or unset the variable",
            serious=True,
        )


def _of_variables(examination: Examination) -> Iterator[Finding]:
    for line in examination.wrong_variables:
        yield Finding(what=line, remedy="give it an allowed value, or unset it", serious=True)
    for line in examination.unknown:
        asked = line.startswith(ALLOW_VARIABLE)
        yield Finding(
            what=line,
            remedy="correct the name, or install the package" if asked else "rename or unset it",
            serious=asked,
        )


def _of_packages(examination: Examination) -> Iterator[Finding]:
    for distribution, missing in examination.missing.items():
        yield Finding(
            what=f"{distribution} requires {', '.join(missing)}, not installed",
            remedy=f"pip install {' '.join(missing)}",
            serious=distribution == "dovetail",
        )


def _of_platform(report: PlatformReport) -> Finding:
    return Finding(
        what=f"platform {report.name} ({report.origin}) is broken: {report.reason}",
        remedy=f"update or uninstall {report.distribution}, or leave it out of {ALLOW_VARIABLE}",
        serious=False,
    )


def _of_entry(report: EntryReport, examination: Examination) -> Finding:
    """A broken listener ends every start; a backend, when it is the one that is wanted."""
    wanted = examination.variables.get(ATTENTION_VARIABLE)
    insisted = kind_of(report.group) == ATTENTION_GROUP and report.name == wanted
    noun = GROUPS.get(kind_of(report.group), "entry")
    return Finding(
        what=f"{noun} {report.name} ({report.origin}, {report.value}) is broken: {report.reason}",
        remedy=f"update or uninstall {report.distribution}, or leave it out of {ALLOW_VARIABLE}",
        serious=report.group == HOOK_GROUP or insisted,
    )


def _of_clashes(examination: Examination) -> Iterator[Finding]:
    """Names that several packages offer, each once: errors only when they are asked for."""
    offers = [(PLATFORM_GROUP, r.name, r.origin) for r in _clashing_platforms(examination)]
    offers += [
        (r.group, r.name, r.origin) for r in examination.entries if r.state == "claimed twice"
    ]
    for group, name in dict.fromkeys(offer[:2] for offer in offers):
        origins = " and ".join(offer[2] for offer in offers if offer[:2] == (group, name))
        yield Finding(
            what=f"{GROUPS[kind_of(group)]} {name} is offered by {origins}",
            remedy=f"uninstall all but one, or name the package to use in {ALLOW_VARIABLE}",
            serious=group == HOOK_GROUP,
        )


def _clashing_platforms(examination: Examination) -> list[PlatformReport]:
    names = [report.name for report in examination.platforms]
    return [report for report in examination.platforms if names.count(report.name) > 1]


def _broken_platforms(examination: Examination) -> list[PlatformReport]:
    clashing = _clashing_platforms(examination)
    broken = [report for report in examination.platforms if report.probe == "broken"]
    return [report for report in broken if report not in clashing]


def _broken_entries(examination: Examination) -> list[EntryReport]:
    return [report for report in examination.entries if report.state == "broken"]


def _folders(examination: Examination) -> list[tuple[str, str]]:
    return [(folder, wrong) for folder, wrong in examination.folders.items() if wrong]


def _line(text: str) -> str:
    return " ".join(text.split())
