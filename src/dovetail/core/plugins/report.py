"""What ``dovetail platforms`` prints: every installed platform, which is chosen, and why."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict

from dovetail.core.errors import DovetailError
from dovetail.core.plugins.examine import PlatformReport
from dovetail.core.plugins.selection import Selection

__all__ = ["platforms_json", "platforms_table"]

_MARKS = {"usable": "+", "absent": "-", "broken": "!"}
_HEADER = ("", "name", "priority", "devices", "package", "reason")


def platforms_table(reports: Sequence[PlatformReport], selection: Selection | DovetailError) -> str:
    """A table for people, without a final newline.

    Args:
        reports: Of every platform, as ``survey_platforms`` gives them.
        selection: The choice, or the error that stands in its way.
    """
    rows = [_HEADER, *(_row(report) for report in sorted(reports, key=_order))]
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEADER) - 1)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    ]
    legend = "+ usable  - absent  ! broken"
    return "\n".join([*lines, "", legend, _verdict(selection)])


def platforms_json(reports: Sequence[PlatformReport], selection: Selection | DovetailError) -> str:
    """The same for programs: ``platforms``, ``selected``, ``reason`` and ``error``."""
    if isinstance(selection, DovetailError):
        verdict = {"selected": None, "reason": None, "error": str(selection)}
    else:
        verdict = {"selected": selection.name, "reason": selection.reason, "error": None}
    platforms = [asdict(report) for report in sorted(reports, key=_order)]
    return json.dumps({"platforms": platforms, **verdict}, indent=2)


def _row(report: PlatformReport) -> tuple[str, ...]:
    priority = "-" if report.priority is None else str(report.priority)
    mark = _MARKS[report.probe]
    return (mark, report.name, priority, str(report.num_devices), report.origin, report.reason)


def _order(report: PlatformReport) -> tuple[int, int, str, str]:
    """Usable before absent before broken; higher priorities first."""
    rank = list(_MARKS).index(report.probe)
    priority = report.priority if report.priority is not None else -(1 << 62)
    return rank, -priority, report.name, report.distribution


def _verdict(selection: Selection | DovetailError) -> str:
    if isinstance(selection, DovetailError):
        return f"Chosen: none. {selection}"
    return f"Chosen: {selection.name}, {selection.reason}"
