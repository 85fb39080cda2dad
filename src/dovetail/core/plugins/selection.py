"""Choosing the platform: the flag, then the variable, then the highest priority among usable ones.

The choice is made once, by the process that the user started; every other process is told the name.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

from dovetail.core.contracts.platform import Capabilities, Platform, PlatformPlugin
from dovetail.core.errors import SelectionError
from dovetail.core.plugins.entries import ALLOW_VARIABLE, AllowList, installed_entries
from dovetail.core.plugins.examine import PLATFORM_GROUP, PlatformReport, refuse_platform
from dovetail.core.plugins.probe import probe_deadline, probe_platforms
from dovetail.core.plugins.registry import Registry, describe_error

__all__ = [
    "DEVICE_VARIABLE",
    "Selection",
    "choose",
    "environment",
    "load_platform",
    "platform_registry",
    "select_platform",
    "survey_platforms",
    "unknown_plugins",
]

DEVICE_VARIABLE = "DOVETAIL_DEVICE"
"""Environment variable: the platform to use where ``--device`` is not given."""

AUTOMATIC = "auto"


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The platform to use, and why."""

    name: str
    reason: str
    """``--device``, the variable, or what made it win. One line."""
    reports: tuple[PlatformReport, ...]
    """All that were probed: only the chosen one, if it was named."""

    def described(self) -> str:
        """With package and version: ``platform cpu (dovetail-cpu 0.1.0)``."""
        origin = next(report.origin for report in self.reports if report.name == self.name)
        return f"platform {self.name} ({origin})"


def select_platform(requested: str | None, environ: Mapping[str, str]) -> Selection:
    """Choose a platform.

    Args:
        requested: The value of ``--device``; None or ``auto`` if the user did not name one.
        environ: The environment of the process.

    Raises:
        SelectionError: The named platform is unknown or unusable, none is usable, or two have the
            same priority. The message says what was found and what to do.
        PluginError: Two packages offer the named platform.
    """
    name, _ = _named(requested, environ)
    if name is None:
        return choose(survey_platforms(environ), requested, environ)
    registry = platform_registry(environ)
    if name not in registry.names():
        raise SelectionError(_unknown(registry, name))
    deadline = probe_deadline(environ)
    reports = probe_platforms([registry.entry(name)], environ, deadline=deadline)
    if reports[0].probe != "usable":
        others = [entry for entry in registry.entries if entry.name != name]
        reports += probe_platforms(others, environ, deadline=deadline)
    return choose(reports, requested, environ)


def survey_platforms(environ: Mapping[str, str]) -> tuple[PlatformReport, ...]:
    """Probe every platform that is installed and allowed."""
    entries = platform_registry(environ).entries
    return probe_platforms(entries, environ, deadline=probe_deadline(environ))


def choose(
    reports: Sequence[PlatformReport], requested: str | None, environ: Mapping[str, str]
) -> Selection:
    """The choice among platforms that have been probed. Raises as ``select_platform`` does."""
    name, source = _named(requested, environ)
    if name is None:
        return _best(tuple(reports))
    found = [report for report in reports if report.name == name]
    if not found:
        raise SelectionError(_unknown(platform_registry(environ), name))
    if found[0].probe != "usable":
        others = ", ".join(r.name for r in reports if r.probe == "usable") or "none"
        state = "is broken" if found[0].probe == "broken" else "cannot be used here"
        raise SelectionError(
            f"The platform {name!r} ({found[0].origin}), named by {source}, {state}:"
            f" {found[0].reason}. Usable here: {others}."
        )
    return Selection(name=name, reason=f"named by {source}", reports=tuple(reports))


def load_platform(name: str, environ: Mapping[str, str] = os.environ) -> Platform:
    """Make the platform, for use in this process. Detects nothing; may import the vendor's stack.

    Raises:
        PluginError: It cannot be made; names the package and its version.
        SelectionError: No platform of that name is installed.
    """
    registry = platform_registry(environ)
    plugin = registry.load(name)
    entry = registry.entry(name)
    try:
        platform: object = plugin.create()
    except (Exception, SystemExit) as error:
        raise registry.error(entry, f"failed to start: {describe_error(error)}") from error
    if not isinstance(platform, Platform):
        kind = type(platform).__name__
        raise registry.error(entry, f"made a {kind}, which is not a Platform")
    if not isinstance(getattr(platform, "capabilities", None), Capabilities):
        raise registry.error(entry, "made a platform that has no Capabilities")
    return platform


def environment(name: str, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Variables that must be set before a process that uses the platform starts.

    Raises PluginError or SelectionError, as ``load_platform`` does.
    """
    return dict(platform_registry(environ).load(name).environment)


def platform_registry(environ: Mapping[str, str]) -> Registry[PlatformPlugin]:
    """The platforms that are installed and that ``DOVETAIL_PLUGINS`` admits."""
    allowed = AllowList.from_environ(environ)
    return Registry(PLATFORM_GROUP, "platform", refuse_platform, allowed=allowed)


def unknown_plugins(environ: Mapping[str, str]) -> str | None:
    """A warning about names in ``DOVETAIL_PLUGINS`` that nothing answers to, if there are any."""
    unknown = AllowList.from_environ(environ).unknown(installed_entries())
    if not unknown:
        return None
    names = ", ".join(repr(name) for name in unknown)
    return f"{ALLOW_VARIABLE} names {names}, which no installed package offers."


def _named(requested: str | None, environ: Mapping[str, str]) -> tuple[str | None, str]:
    """The platform that the user named, None if it is left to us, and where they said so."""
    for value, source in ((requested, "--device"), (environ.get(DEVICE_VARIABLE), DEVICE_VARIABLE)):
        name = (value or "").strip().lower()
        if name not in ("", AUTOMATIC):
            return name, source
    return None, ""


def _best(reports: tuple[PlatformReport, ...]) -> Selection:
    usable = [r for r in reports if r.probe == "usable" and r.priority is not None]
    if not usable:
        lines = [f"\n  {r.name} ({r.origin}): {_why_not(r)}" for r in reports]
        raise SelectionError(f"No platform is usable here.{''.join(lines)}{_installable()}")
    highest = max(r.priority for r in usable if r.priority is not None)
    first, *rivals = (r for r in usable if r.priority == highest)
    if rivals:
        names = " and ".join(f"{r.name} ({r.origin})" for r in (first, *rivals))
        raise SelectionError(
            f"{names} are usable with the same priority, {highest}. Name one, with"
            f" --device {first.name} or {DEVICE_VARIABLE}={first.name}."
        )
    why = "the only usable platform with a priority"
    if len(usable) > 1:
        why = f"highest priority ({highest}) of {len(usable)} usable"
    return Selection(
        name=first.name, reason=f"automatic: {why}; {first.reason}", reports=tuple(reports)
    )


def _why_not(report: PlatformReport) -> str:
    if report.probe == "usable":
        return "usable, but only when it is named"
    return f"{report.probe}: {report.reason}"


def _unknown(registry: Registry[PlatformPlugin], name: str) -> str:
    hidden = any(entry.name == name for entry in registry.excluded)
    return registry.unknown(name) + ("" if hidden else _installable(name))


def _installable(name: str | None = None) -> str:
    """Which extras of Dovetail's own distribution would bring a platform; empty if none would."""
    extras = _platform_extras()
    if name in extras:
        return f" To install it: pip install 'dovetail[{name}]'."
    if name is not None or not extras:
        return ""
    commands = " or ".join(f"pip install 'dovetail[{extra}]'" for extra in sorted(extras))
    return f"\nTo install one: {commands}."


def _platform_extras() -> list[str]:
    """Extras that install a distribution of ours by the same name: ``[x]`` for ``dovetail-x``."""
    try:
        requirements = metadata.requires("dovetail") or []
        extras = metadata.metadata("dovetail").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return []
    packages = {re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in requirements}
    return [extra for extra in extras if f"dovetail-{extra}" in packages]
