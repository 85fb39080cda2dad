"""Level 2: collectives between two processes, against numpy."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

from dovetail.core.conformance.base import Check, CheckFailedError, expect
from dovetail.core.conformance.peer import COLLECTIVES, LOST, UNSUPPORTED, Found
from dovetail.core.conformance.subject import Subject
from dovetail.core.errors import UnsupportedError

__all__ = ["checks"]

_SIZE = 2
_DEADLINE_S = 60.0
_POLL_S = 0.02
_PEER = "dovetail.core.conformance.peer"


def checks(subject: Subject) -> Iterator[Check]:
    """One for each collective, and one for a member that is lost."""
    for name in COLLECTIVES:
        yield Check(
            name=f"collectives.{name}",
            level=2,
            statement=f"{name} between two processes gives what numpy gives.",
            function=partial(_collective, name=name),
        )
    yield Check(
        name="collectives.lost_member",
        level=2,
        statement="When a member is gone, the others get an error instead of waiting for ever.",
        function=_lost_member,
    )


def _collective(subject: Subject, name: str) -> None:
    members = subject.once("collectives", lambda: _found(subject))
    for rank, (found, *_) in enumerate(members):
        expect(name not in found, f"member {rank}: {found.get(name)}")


def _found(subject: Subject) -> list[list[Found]]:
    """What each member of a group has found, at first and when one was lost."""
    with _Group(subject, _SIZE) as group:
        group.wait(_DEADLINE_S)
        return [group.answers(rank) for rank in range(_SIZE)]


def _lost_member(subject: Subject) -> None:
    survivor = subject.once("collectives", lambda: _found(subject))[0]
    expect(len(survivor) > 1, f"the other member still waits after {_DEADLINE_S:g} s")
    expect(LOST not in survivor[1], f"the other member: {survivor[1].get(LOST)}")


class _Group:
    """Processes that form a group, killed with the context."""

    def __init__(self, subject: Subject, size: int) -> None:
        self._folder = TemporaryDirectory(prefix="dovetail-conformance-")
        address = str(Path(self._folder.name, "address"))
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        wanted = {**subject.plugin.environment, **os.environ, "PYTHONPATH": path}
        common = [sys.executable, "-P", "-m", _PEER, subject.name]
        self.members = [
            subprocess.Popen(
                [*common, str(rank), str(size), address],
                env=wanted,
                stdin=subprocess.DEVNULL,
                stdout=self._file(rank, "out").open("wb"),
                stderr=self._file(rank, "err").open("wb"),
            )
            for rank in range(size)
        ]

    def __enter__(self) -> _Group:
        return self

    def __exit__(self, *error: object) -> None:
        for member in self.members:
            member.kill()
            member.wait()
        self._folder.cleanup()

    def wait(self, deadline: float) -> None:
        """Return when all have ended, or at the deadline."""
        end = time.monotonic() + deadline
        while any(m.poll() is None for m in self.members) and time.monotonic() < end:
            time.sleep(_POLL_S)

    def answers(self, rank: int) -> list[Found]:
        """The lines that a member has written. Raises CheckFailedError if there is none."""
        lines = self._file(rank, "out").read_text("utf-8", "replace").splitlines()
        found: list[Found] = [json.loads(line) for line in lines if line.startswith("{")]
        if not found:
            status = self.members[rank].poll()
            said = self._file(rank, "err").read_text("utf-8", "replace").splitlines()
            last = next((line for line in reversed(said) if line.strip()), "")
            ended = "did not end" if status is None else f"ended with status {status}"
            raise CheckFailedError(f"member {rank} {ended} and found nothing: {last:.300}")
        if UNSUPPORTED in found[0]:
            raise UnsupportedError(found[0][UNSUPPORTED])
        return found

    def _file(self, rank: int, kind: str) -> Path:
        return Path(self._folder.name, f"{rank}.{kind}")
