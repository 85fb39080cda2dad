"""Probing platforms: Dovetail's own in this process, all others in child processes, in parallel.

A plug-in that cannot be imported, aborts, hangs, calls ``sys.exit``, prints, or speaks another
version of the interface costs at most the deadline, and never this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dovetail.core.errors import ConfigError
from dovetail.core.plugins.entries import Entry
from dovetail.core.plugins.examine import PlatformReport, broken, examine
from dovetail.core.plugins.probe_child import MARKER
from dovetail.core.plugins.registry import clash

__all__ = ["DEADLINE", "DEADLINE_VARIABLE", "probe_deadline", "probe_platforms"]

DEADLINE = 5.0
"""Seconds that all child processes together have, unless the variable below says otherwise."""

DEADLINE_VARIABLE = "DOVETAIL_PROBE_TIMEOUT"

_POLL_SECONDS = 0.004
_MAX_OUTPUT = 1 << 16


@dataclass(frozen=True)
class _Child:
    entry: Entry
    process: subprocess.Popen[bytes]
    output: Path
    errors: Path


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
    reports: dict[Entry, PlatformReport] = {}
    children: list[_Child] = []
    with TemporaryDirectory(prefix="dovetail-probe-") as folder, ExitStack() as cleanup:
        for index, entry in enumerate(entries):
            try:
                child = _start(entry, environ, Path(folder, str(index)))
            except OSError as error:
                reports[entry] = broken(entry, f"no process could be started for it: {error}")
            else:
                cleanup.callback(_end, child)
                children.append(child)
        _wait(children, deadline)
        reports |= {child.entry: _collect(child, deadline) for child in children}
    return reports


def _start(entry: Entry, environ: Mapping[str, str], files: Path) -> _Child:
    output, errors = files.with_suffix(".out"), files.with_suffix(".err")
    module = "dovetail.core.plugins.probe_child"
    child_environ = {
        **environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    with output.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, json.dumps(asdict(entry))],
            env=child_environ,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    return _Child(entry, process, output, errors)


def _wait(children: list[_Child], deadline: float) -> None:
    """Return when all have ended, or at the deadline."""
    end = time.monotonic() + deadline
    while any(child.process.poll() is None for child in children) and time.monotonic() < end:
        time.sleep(_POLL_SECONDS)


def _end(child: _Child) -> None:
    """Kill a child that still runs, with everything that it started."""
    if child.process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        os.killpg(child.process.pid, signal.SIGKILL)
    else:
        child.process.kill()
    child.process.wait()


def _collect(child: _Child, deadline: float) -> PlatformReport:
    if child.process.poll() is None:
        return broken(
            child.entry,
            f"its probe did not answer within {deadline:g} s ({DEADLINE_VARIABLE} changes that)",
        )
    lines = _tail(child.output)
    answers = [line for line in lines if line.startswith(MARKER)]
    if not answers:
        return broken(child.entry, _last_words(child))
    answer: dict[str, Any] = json.loads(answers[-1].removeprefix(MARKER))
    return PlatformReport(**answer)


def _last_words(child: _Child) -> str:
    code = child.process.returncode
    lines = [line for line in _tail(child.errors) if line.strip()]
    said = f": {lines[-1]}" if lines else ""
    if code < 0:
        return f"its probe was ended by {signal.Signals(-code).name}{said}"
    return f"its probe ended with exit status {code} and no answer{said}"


def _tail(path: Path) -> list[str]:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _MAX_OUTPUT))
        return stream.read().decode(errors="replace").splitlines()
