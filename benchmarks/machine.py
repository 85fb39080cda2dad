"""What a measurement was made on, as far as the machine says."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version

from dovetail.core.machine import look_at_machine

__all__ = ["describe_machine"]

_PACKAGES = ("dovetail", "torch", "triton", "transformers")


def describe_machine() -> dict[str, str]:
    """Devices, driver, processor, versions, commit; entries that cannot be had are left out."""
    found = {}
    if gpus := _line("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"):
        found["GPU"] = gpus
        found["driver"] = _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    found["CPU"] = look_at_machine().processor
    found["Python"] = platform.python_version()
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    if commit := _line("git", "rev-parse", "--short", "HEAD"):
        found["commit"] = commit
    return found


def _line(*command: str) -> str:
    """The first line that a program writes; empty if it is not there or fails."""
    if shutil.which(command[0]) is None:
        return ""
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return lines[0].strip() if lines else ""
