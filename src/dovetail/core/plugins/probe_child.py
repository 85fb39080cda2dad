"""The child process of a probe: ``python -m dovetail.core.plugins.probe_child ENTRY``.

``ENTRY`` is the entry as JSON. The report goes to the standard output that the process was started
with, behind a marker; whatever the plug-in prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from dovetail.core.plugins.entries import Entry
from dovetail.core.plugins.examine import examine

__all__ = ["MARKER", "main"]

MARKER = "@dovetail-probe@"
"""Begins the line that holds the report."""


def main(arguments: list[str]) -> None:
    """Examine the entry, write the report, and end without waiting for what the plug-in started."""
    report_stream = os.dup(1)
    os.dup2(2, 1)
    report = examine(Entry(**json.loads(arguments[0])))
    os.write(report_stream, f"\n{MARKER}{json.dumps(asdict(report))}\n".encode())
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
