"""What a platform says of itself once it is made. Making it may import the vendor's stack."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field
from typing import cast

from dovetail.core.contracts.platform import Memory, Platform, PlatformPlugin
from dovetail.core.errors import DovetailError
from dovetail.core.plugins.attention import BrokenBackend
from dovetail.core.plugins.entries import Entry
from dovetail.core.plugins.examine import refuse_platform
from dovetail.core.plugins.registry import LoadError, describe_error, import_entry
from dovetail.core.plugins.selection import load_platform

__all__ = ["StartReport", "start_report"]


@dataclass(frozen=True, kw_only=True)
class StartReport:
    """What came of making a platform."""

    name: str
    error: str = ""
    """Why it could not be made, or what it could not say of itself; empty if all is well."""
    devices: list[str] = field(default_factory=list)
    """A readable name for each device."""
    memory_free: int = 0
    """Bytes of the first device."""
    memory_total: int = 0
    family: str = ""
    dtypes: list[str] = field(default_factory=list)
    attention: list[str] = field(default_factory=list)
    """Attention backends that can be made, in the platform's order of preference."""
    features: list[str] = field(default_factory=list)
    """Its optional abilities."""


def start_report(entry: Entry, answers: int) -> StartReport:
    """Make the platform and ask it what it is. Runs in a child process.

    Args:
        entry: The platform.
        answers: The file descriptor that becomes standard output again if the process has to
            begin anew with the platform's variables set.
    """
    try:
        plugin = cast(PlatformPlugin, import_entry(entry, refuse_platform))
        _set_environment(plugin, answers)
        return _describe(load_platform(entry.name))
    except (LoadError, DovetailError) as error:
        return StartReport(name=entry.name, error=str(error))
    except (Exception, SystemExit) as error:
        what = f"it was made, but asking it failed: {describe_error(error)}"
        return StartReport(name=entry.name, error=what)


def _set_environment(plugin: PlatformPlugin, answers: int) -> None:
    """Begin anew if variables are missing: libraries read them when the process starts."""
    missing = {name: value for name, value in plugin.environment.items() if name not in os.environ}
    if missing:
        os.dup2(answers, 1)
        os.execve(sys.executable, sys.orig_argv, {**os.environ, **missing})


def _describe(platform: Platform) -> StartReport:
    memory: object = platform.memory()
    if not isinstance(memory, Memory):
        kind = type(memory).__name__
        return StartReport(name=platform.name, error=f"its memory() gave {kind}, not Memory")
    return StartReport(
        name=platform.name,
        devices=[str(name) for name in platform.device_names()],
        memory_free=memory.free,
        memory_total=memory.total,
        family=platform.capabilities.family,
        dtypes=list(platform.capabilities.dtypes),
        attention=[
            backend.name
            for backend in platform.attention_backends()
            if not isinstance(backend, BrokenBackend)
        ],
        features=sorted(platform.capabilities.features),
    )
