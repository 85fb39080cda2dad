"""Loading one platform plug-in and asking it, in this process, whether its hardware is usable."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, cast

from dovetail.core.contracts.platform import API_VERSION, PlatformPlugin, ProbeResult
from dovetail.core.plugins.entries import Entry
from dovetail.core.plugins.registry import (
    LoadError,
    describe_error,
    import_entry,
    instance_of,
)

__all__ = ["PLATFORM_GROUP", "PlatformReport", "broken", "examine", "refuse_platform"]

PLATFORM_GROUP = "dovetail.platforms"

_MAX_REASON = 300


@dataclass(frozen=True, kw_only=True)
class PlatformReport:
    """What is known about one platform that is installed."""

    name: str
    distribution: str
    version: str
    priority: int | None
    """None: chosen only when it is named, or broken before it could say."""
    probe: Literal["usable", "absent", "broken"]
    """``absent``: the plug-in works and its hardware is not there."""
    reason: str
    """What was found or what is wrong, in one line."""
    num_devices: int = 0

    @property
    def origin(self) -> str:
        """Package and version: ``dovetail-cpu 0.1.0``."""
        return f"{self.distribution} {self.version}"


def refuse_platform(found: object) -> str | None:
    """Why a loaded object cannot serve as a platform plug-in, if it cannot."""
    wrong_type = instance_of(PlatformPlugin)(found)
    if wrong_type is not None:
        return wrong_type
    plugin = cast(PlatformPlugin, found)
    if plugin.api_version != API_VERSION:
        return (
            f"is written for platform interface {plugin.api_version!r}; this Dovetail has"
            f" {API_VERSION}"
        )
    if not (plugin.priority is None or type(plugin.priority) is int):
        return f"has the priority {plugin.priority!r:.80}, which is neither an integer nor None"
    if not _is_environment(plugin.environment):
        return f"has the environment {plugin.environment!r:.80}, which does not map text to text"
    if not (callable(plugin.probe) and callable(plugin.create)):
        return "has a probe or a create that cannot be called"
    return None


def _is_environment(found: object) -> bool:
    if not isinstance(found, Mapping):
        return False
    return all(isinstance(text, str) for pair in found.items() for text in pair)


def examine(entry: Entry) -> PlatformReport:
    """Import the plug-in, check what it says of itself, and run its probe.

    A plug-in that raises or answers wrongly gives a ``broken`` report. One that hangs or ends the
    process does so here: code of third parties is examined in a child process.
    """
    try:
        plugin = cast(PlatformPlugin, import_entry(entry, refuse_platform))
    except LoadError as error:
        return broken(entry, str(error))
    return _ask(entry, plugin)


def broken(entry: Entry, reason: str, priority: int | None = None) -> PlatformReport:
    """The report of a plug-in that cannot even say whether its hardware is there."""
    return PlatformReport(
        name=entry.name,
        distribution=entry.distribution,
        version=entry.version,
        priority=priority,
        probe="broken",
        reason=_one_line(reason),
    )


def _ask(entry: Entry, plugin: PlatformPlugin) -> PlatformReport:
    try:
        result: object = plugin.probe()
    except (Exception, SystemExit) as error:
        return broken(entry, f"its probe failed: {describe_error(error)}", plugin.priority)
    if not isinstance(result, ProbeResult):
        kind = type(result).__name__
        return broken(entry, f"its probe returned {kind}, not ProbeResult", plugin.priority)
    if type(result.num_devices) is not int:
        what = f"its probe counts {result.num_devices!r:.80} devices"
        return broken(entry, what, plugin.priority)
    return PlatformReport(
        name=entry.name,
        distribution=entry.distribution,
        version=entry.version,
        priority=plugin.priority,
        probe="usable" if result.usable else "absent",
        reason=_one_line(str(result.reason)),
        num_devices=result.num_devices,
    )


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_REASON else line[: _MAX_REASON - 3] + "..."
