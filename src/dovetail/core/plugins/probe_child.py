"""The child process of a question: ``python -m dovetail.core.plugins.probe_child WHAT ENTRIES``.

``WHAT`` is a question of ``children.Errand``, ``ENTRIES`` a JSON list of entries. Each answer goes
to the standard output that the process was started with, on a line of its own behind a marker;
whatever the plug-in prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from dovetail.core.plugins.entries import Entry

__all__ = ["MARKER", "main"]

MARKER = "@dovetail-probe@"
"""Begins a line that holds an answer."""


def main(arguments: list[str]) -> None:
    """Answer for each entry, and end without waiting for what the plug-ins started."""
    question, entries = arguments
    answers = os.dup(1)
    os.dup2(2, 1)
    for fields in json.loads(entries):
        report = _answerer(question, answers)(Entry(**fields))
        os.write(answers, f"\n{MARKER}{json.dumps(asdict(report))}\n".encode())
    sys.stderr.flush()
    os._exit(0)


def _answerer(question: str, answers: int) -> Callable[[Entry], Any]:
    """Who answers; only what is needed is imported."""
    if question == "probe":
        from dovetail.core.plugins.examine import examine

        return examine
    if question == "import":
        from dovetail.core.plugins.health import import_report

        return import_report
    from dovetail.core.plugins.start import start_report

    return lambda entry: start_report(entry, answers)


if __name__ == "__main__":
    main(sys.argv[1:])
