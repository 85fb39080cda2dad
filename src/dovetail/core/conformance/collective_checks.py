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
from typing import Any

from dovetail.core.conformance.base import Check, CheckFailedError, expect
from dovetail.core.conformance.peer import COLLECTIVES, DIES, UNSUPPORTED, Found
from dovetail.core.conformance.subject import Subject
from dovetail.core.errors import UnsupportedError

__all__ = ["checks"]

_SIZE = 2
_DEADLINE_S = 60.0
_POLL_S = 0.02


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
    for rank, found in enumerate(members):
        expect(name not in found, f"member {rank}: {found.get(name)}")


def _found(subject: Subject) -> list[Found]:
    """What each member of a group has found."""
    with _Group(subject, [[]] * _SIZE) as group:
        group.wait(_DEADLINE_S)
        return [group.answer(rank) for rank in range(_SIZE)]


def _lost_member(subject: Subject) -> None:
    subject.once("collectives", lambda: _found(subject))
    with _Group(subject, [[], [DIES]]) as group:
        group.wait(_DEADLINE_S)
        status = group.members[0].returncode
        expect(status is not None, f"the other member still waits after {_DEADLINE_S:g} s")
        expect(status != 0, "the other member has noticed nothing")


class _Group:
    """Processes that form a group, killed with the context.

    Args:
        subject: Whose platform's collectives they use.
        extra: More arguments for each member.
    """

    def __init__(self, subject: Subject, extra: list[list[str]]) -> None:
        self._folder = TemporaryDirectory(prefix="dovetail-conformance-")
        address = str(Path(self._folder.name, "address"))
        path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
        wanted = {**subject.plugin.environment, **os.environ, "PYTHONPATH": path}
        common = [sys.executable, "-P", "-m", "dovetail.core.conformance.peer", subject.name]
        self.members = [
            subprocess.Popen(
                [*common, str(rank), str(len(extra)), address, *more],
                env=wanted,
                stdin=subprocess.DEVNULL,
                stdout=self._file(rank, "out").open("wb"),
                stderr=self._file(rank, "err").open("wb"),
            )
            for rank, more in enumerate(extra)
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

    def answer(self, rank: int) -> Found:
        """What a member has written. Raises CheckFailedError if it wrote nothing."""
        status = self.members[rank].poll()
        if status is None:
            raise CheckFailedError(f"member {rank} did not end within {_DEADLINE_S:g} s")
        lines = self._file(rank, "out").read_text("utf-8", "replace").splitlines()
        if status or not lines:
            said = self._file(rank, "err").read_text("utf-8", "replace").split("\n")
            last = next((line for line in reversed(said) if line.strip()), "")
            raise CheckFailedError(f"member {rank} ended with status {status}: {last:.300}")
        found: dict[str, Any] = json.loads(lines[-1])
        if UNSUPPORTED in found:
            raise UnsupportedError(str(found[UNSUPPORTED]))
        return found

    def _file(self, rank: int, kind: str) -> Path:
        return Path(self._folder.name, f"{rank}.{kind}")
