"""Commands with a time limit, each in a process group of its own."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

__all__ = ["Outcome", "dovetail", "run", "seconds_until_ready"]

_POLL_S = 0.02


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a command ended."""

    status: int
    seconds: float
    output: str
    errors: str
    timed_out: bool = False
    command: str = ""

    def json(self) -> dict[str, Any]:
        """What it wrote to standard output; empty if that is not JSON."""
        try:
            found = json.loads(self.output)
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}

    def last_line(self) -> str:
        """Of what it said about itself."""
        lines = [line for line in self.errors.splitlines() if line.strip()]
        return lines[-1].strip() if lines else f"status {self.status}"


def dovetail(*words: str) -> list[str]:
    """The command line of a ``dovetail`` command."""
    return [sys.executable, "-m", "dovetail", *words]


def run(command: Sequence[str], limit: float) -> Outcome:
    """Run a command to its end, or for ``limit`` seconds. What it says is kept."""
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=errors,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            text=True,
        )
        timed_out = False
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            seconds = time.monotonic() - start
            status = _end(process)
        output.seek(0)
        errors.seek(0)
        return Outcome(
            status=status,
            seconds=seconds,
            output=output.read(),
            errors=errors.read(),
            timed_out=timed_out,
            command=_shown(command),
        )


def seconds_until_ready(words: Sequence[str], limit: float) -> Outcome:
    """Start a server, wait until it is ready, stop it: ``seconds`` is from the command to ready."""
    port = _free_port()
    command = dovetail(*words, "--port", str(port))
    start = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True
        )
        is_ready = timed_out = False
        try:
            while not is_ready and not timed_out and process.poll() is None:
                time.sleep(_POLL_S)
                is_ready = _is_ready(port)
                timed_out = time.monotonic() - start > limit
        finally:
            seconds = time.monotonic() - start
            _end(process)
        log.seek(0)
        return Outcome(
            status=0 if is_ready else 1,
            seconds=seconds,
            output="",
            errors=log.read(),
            timed_out=timed_out and not is_ready,
            command=_shown(command),
        )


def _end(process: subprocess.Popen[Any]) -> int:
    """Ask the process to end, then kill it and what it has left behind; its exit status."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait()


def _shown(command: Sequence[str]) -> str:
    """As one would type it."""
    return "dovetail " + shlex.join(command[3:]) if command[1:3] == ["-m", "dovetail"] else ""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()
