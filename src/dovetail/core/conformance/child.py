"""A plug-in seen from a process of its own: ``python -m dovetail.core.conformance.child``.

The report is written to a file, so that all that comes on standard output is the plug-in's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dovetail.core.conformance.base import CheckFailedError
from dovetail.core.plugins.entries import Entry
from dovetail.core.plugins.examine import examine

__all__ = ["FRAMEWORKS", "Seen", "look_at", "loaded_by", "main", "run_child"]

FRAMEWORKS = ("torch", "jax", "jaxlib", "tensorflow")
"""What must not be imported where nothing is computed yet."""

_DEADLINE_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What a probe in a fresh process did."""

    probe: str
    """As ``PlatformReport.probe``."""
    reason: str
    num_devices: int
    seconds: float
    """Of import and probe together; Dovetail itself was imported before."""
    frameworks: list[str]
    """Which were imported by it."""
    printed: str
    """What came on standard output."""


def look_at(entry: Entry) -> Seen:
    """Import and probe a plug-in in a fresh process.

    Raises:
        CheckFailedError: The process ended without a report, or did not end in a minute.
    """
    with TemporaryDirectory(prefix="dovetail-conformance-") as folder:
        report = Path(folder, "report.json")
        module = "dovetail.core.conformance.child"
        done = run_child([module, json.dumps(asdict(entry)), str(report)])
        if not report.exists():
            raise CheckFailedError(f"its process ended with status {done.returncode}{_said(done)}")
        found: dict[str, Any] = json.loads(report.read_text("utf-8"))
    return Seen(**found, printed=done.stdout)


def loaded_by(modules: list[str]) -> list[str]:
    """The frameworks that a fresh process has imported once it has imported these modules."""
    module = "dovetail.core.conformance.child"
    done = run_child([module, "--imports", ",".join(modules)])
    if done.returncode:
        raise CheckFailedError(f"importing them ended with status {done.returncode}{_said(done)}")
    names: list[str] = json.loads(done.stdout)
    return names


def run_child(arguments: list[str], deadline: float = _DEADLINE_S) -> Any:
    """A finished ``python -m``, with its output as text. CheckFailedError at the deadline."""
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    try:
        return subprocess.run(
            [sys.executable, "-P", "-m", *arguments],
            env={**os.environ, "PYTHONPATH": path, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=deadline,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckFailedError(f"its process did not end within {deadline:g} s") from error


def _said(done: Any) -> str:
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return f": {lines[-1]:.200}" if lines else ""


def main(arguments: list[str]) -> None:
    """The child: look, write the report, end without waiting for what the plug-in started."""
    if arguments[0] == "--imports":
        for name in arguments[1].split(","):
            __import__(name)
        sys.stdout.write(json.dumps(_frameworks()))
        return
    start = time.perf_counter()
    report = examine(Entry(**json.loads(arguments[0])))
    seen = {
        "probe": report.probe,
        "reason": report.reason,
        "num_devices": report.num_devices,
        "seconds": time.perf_counter() - start,
        "frameworks": _frameworks(),
    }
    Path(arguments[1]).write_text(json.dumps(seen), "utf-8")
    sys.stdout.flush()
    os._exit(0)


def _frameworks() -> list[str]:
    return [name for name in FRAMEWORKS if name in sys.modules]


if __name__ == "__main__":
    main(sys.argv[1:])
