"""The ``dovetail`` command in a process of its own, with packages that a folder holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

__all__ = ["dovetail", "environment", "install"]


def environment(*folders: Path, **variables: str) -> dict[str, str]:
    """This process's environment without Dovetail's variables, the folders first on the path."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("DOVETAIL_")}
    path = [*map(str, folders), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(path)} | variables


def dovetail(
    *words: str, folder: Path | None = None, timeout: float = 120, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end.

    Args:
        words: Of the command line.
        folder: Where further packages are installed.
        timeout: Seconds.
        variables: Of the environment.
    """
    return subprocess.run(
        [sys.executable, "-m", "dovetail", *words],
        env=environment(*([folder] if folder else []), **variables),
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def install(project: Path, folder: Path) -> None:
    """Install a distribution from its sources into a folder, without the network."""
    options = ["--no-index", "--no-deps", "--no-build-isolation", "--target", str(folder)]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, str(project)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
