"""Questions about plug-ins, answered by child processes that run in parallel, under deadlines.

A plug-in that cannot be imported, aborts, hangs, calls ``sys.exit`` or prints costs at most the
deadline, and never this process.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from dovetail.core.plugins.entries import Entry
from dovetail.core.plugins.probe_child import MARKER

__all__ = ["Errand", "Outcome", "ask"]

_POLL_SECONDS = 0.004
_MAX_OUTPUT = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Errand:
    """What one child process finds out, of one entry after another."""

    question: Literal["probe", "import", "start"]
    """``probe``: the report of a platform; ``import``: whether the entry loads and is of the right
    kind; ``start``: what the platform says once it is made."""
    entries: tuple[Entry, ...]
    deadline: float
    """Seconds, for all entries together."""
    remedy: str
    """What changes the deadline, for the message of one that was not kept."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came back from an errand."""

    answers: tuple[dict[str, Any], ...]
    """One per entry, in order; fewer if the child did not come to the end."""
    complaint: str
    """Why there are fewer: what the first entry without an answer did, in one line. Or empty."""


@dataclass(frozen=True)
class _Child:
    errand: Errand
    process: subprocess.Popen[bytes]
    output: Path
    errors: Path


def ask(errands: Sequence[Errand], environ: Mapping[str, str]) -> tuple[Outcome, ...]:
    """Run all errands at once; the outcomes come in their order.

    Args:
        errands: Each gets a process of its own.
        environ: The environment of the processes.
    """
    outcomes: dict[int, Outcome] = {}
    children: dict[int, _Child] = {}
    started = time.monotonic()
    with TemporaryDirectory(prefix="dovetail-probe-") as folder, ExitStack() as cleanup:
        for index, errand in enumerate(errands):
            try:
                child = _start(errand, environ, Path(folder, str(index)))
            except OSError as error:
                complaint = f"no process could be started for it: {error}"
                outcomes[index] = Outcome(answers=(), complaint=complaint)
            else:
                cleanup.callback(_end, child)
                children[index] = child
        _wait(list(children.values()), started)
        outcomes |= {index: _collect(child) for index, child in children.items()}
    return tuple(outcomes[index] for index in range(len(errands)))


def _start(errand: Errand, environ: Mapping[str, str], files: Path) -> _Child:
    output, errors = files.with_suffix(".out"), files.with_suffix(".err")
    module = "dovetail.core.plugins.probe_child"
    entries = json.dumps([asdict(entry) for entry in errand.entries])
    child_environ = {
        **environ,
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
    }
    with output.open("wb") as stdout, errors.open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", module, errand.question, entries],
            env=child_environ,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
    return _Child(errand, process, output, errors)


def _wait(children: list[_Child], started: float) -> None:
    """Return when each has ended or is past its own deadline."""
    waiting = children
    while waiting := [child for child in waiting if child.process.poll() is None]:
        elapsed = time.monotonic() - started
        waiting = [child for child in waiting if elapsed < child.errand.deadline]
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


def _collect(child: _Child) -> Outcome:
    ended = child.process.poll() is not None
    lines = [line for line in _tail(child.output) if line.startswith(MARKER)]
    answers = tuple(json.loads(line.removeprefix(MARKER)) for line in lines)
    complaint = ""
    if len(answers) < len(child.errand.entries):
        complaint = _last_words(child) if ended else _too_late(child.errand)
    return Outcome(answers=answers, complaint=complaint)


def _too_late(errand: Errand) -> str:
    what = f"its {errand.question} did not answer within {errand.deadline:g} s"
    return f"{what} ({errand.remedy} changes that)"


def _last_words(child: _Child) -> str:
    code = child.process.returncode
    lines = [line for line in _tail(child.errors) if line.strip()]
    said = f": {lines[-1]}" if lines else ""
    if code < 0:
        return f"its {child.errand.question} was ended by {signal.Signals(-code).name}{said}"
    return f"its {child.errand.question} ended with exit status {code} and no answer{said}"


def _tail(path: Path) -> list[str]:
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _MAX_OUTPUT))
        return stream.read().decode(errors="replace").splitlines()
