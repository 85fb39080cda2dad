"""Everything that can be found out about an installation without importing any of it here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dovetail.core.config.env import KNOWN_VARIABLES, read_environment, unknown_variables
from dovetail.core.config.locate import hub_cache
from dovetail.core.errors import DovetailError, UserError
from dovetail.core.machine import Machine, look_at_machine
from dovetail.core.plugins.children import Errand, Outcome, ask
from dovetail.core.plugins.entries import AllowList, Entry, installed_entries
from dovetail.core.plugins.examine import PLATFORM_GROUP, PlatformReport
from dovetail.core.plugins.health import EntryReport, import_errands, import_reports
from dovetail.core.plugins.packages import missing_packages, package_versions
from dovetail.core.plugins.probe import probe_deadline
from dovetail.core.plugins.selection import (
    Selection,
    choose,
    platform_registry,
    survey_platforms,
    unknown_plugins,
)
from dovetail.core.plugins.start import StartReport

__all__ = ["Examination", "examine_installation"]

_IMPORT_DEADLINE = 30.0
_START_DEADLINE = 60.0
_REMEDY = "--timeout"
_SECRET = "DOVETAIL_API_KEY"
_MAX_SOCKET_PATH = 90
"""Bytes of a folder's name that leave room for a socket in it (sun_path has 104 or more)."""


@dataclass(frozen=True, kw_only=True)
class Examination:
    """What was found."""

    versions: dict[str, str]
    """Versions of the packages that matter, by name."""
    missing: dict[str, tuple[str, ...]]
    """Packages that are not installed, by the distribution that requires them."""
    machine: Machine
    variables: dict[str, str]
    """The ``DOVETAIL_*`` variables that are set; what is secret is not shown."""
    wrong_variables: tuple[str, ...]
    """One line for each value that is not allowed."""
    unknown: tuple[str, ...]
    """One line for each variable, or item of ``DOVETAIL_PLUGINS``, that means nothing."""
    folders: dict[str, str]
    """What is wrong with a folder that is written to, or an empty text; by its path."""
    platforms: tuple[PlatformReport, ...]
    selection: Selection | None
    """The choice; None if there is none."""
    selection_error: str
    """What stands in its way; else empty."""
    start: StartReport | None
    """What the chosen platform says of itself; None if nothing is chosen."""
    entries: tuple[EntryReport, ...]
    """Everything that is installed besides platforms."""
    kept_out: tuple[Entry, ...]
    """Platforms that ``DOVETAIL_PLUGINS`` does not name."""


def examine_installation(
    requested: str | None, environ: Mapping[str, str], *, timeout: float | None = None
) -> Examination:
    """Look at everything. Code of third parties runs in child processes only.

    Args:
        requested: The value of ``--device``; None or ``auto`` if the user did not name one.
        environ: The environment of the process.
        timeout: Seconds that importing a plug-in, and starting the chosen platform, may take.
    """
    wrong = _wrong_variables(environ)
    variables = _variables(environ)
    environ = {name: value for name, value in environ.items() if name not in wrong}
    found = installed_entries()
    platforms = survey_platforms(environ)
    selection, selection_error = _choice(platforms, requested, environ)
    start, entries = _look_inside(found, selection, environ, timeout)
    allowed = AllowList.from_environ(environ)
    own = sorted({"dovetail", *(entry.distribution for entry in found)})
    return Examination(
        versions=package_versions(own),
        missing={name: lacking for name in own if (lacking := missing_packages(name))},
        machine=look_at_machine(environ),
        variables=variables,
        wrong_variables=tuple(wrong.values()),
        unknown=(*unknown_variables(environ), *filter(None, [unknown_plugins(environ)])),
        folders=_folders(environ),
        platforms=platforms,
        selection=selection,
        selection_error=selection_error,
        start=start,
        entries=entries,
        kept_out=tuple(e for e in found if e.group == PLATFORM_GROUP and not allowed.admits(e)),
    )


def _choice(
    platforms: tuple[PlatformReport, ...], requested: str | None, environ: Mapping[str, str]
) -> tuple[Selection | None, str]:
    try:
        return choose(platforms, requested, environ), ""
    except DovetailError as error:
        return None, str(error)


def _look_inside(
    found: tuple[Entry, ...],
    selection: Selection | None,
    environ: Mapping[str, str],
    timeout: float | None,
) -> tuple[StartReport | None, tuple[EntryReport, ...]]:
    """Start the chosen platform and import everything else, all at once."""
    errands = list(
        import_errands(found, environ, deadline=timeout or _IMPORT_DEADLINE, remedy=_REMEDY)
    )
    if selection is not None:
        start = Errand(
            question="start",
            entries=(platform_registry(environ).entry(selection.name),),
            deadline=timeout or _START_DEADLINE,
            remedy=_REMEDY,
        )
        outcomes = ask([start, *errands], environ)
        return _started(selection.name, outcomes[0]), import_reports(
            found, environ, errands, outcomes[1:]
        )
    return None, import_reports(found, environ, errands, ask(errands, environ))


def _started(name: str, outcome: Outcome) -> StartReport:
    if outcome.answers:
        return StartReport(**outcome.answers[0])
    return StartReport(name=name, error=outcome.complaint)


def _wrong_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What is wrong with the values of variables, by variable."""
    wrong: dict[str, str] = {}
    for name in KNOWN_VARIABLES:
        if name not in environ:
            continue
        try:
            read_environment({name: environ[name]}, warn=False)
            probe_deadline({name: environ[name]})
        except UserError as error:
            wrong[name] = str(error)
    return wrong


def _variables(environ: Mapping[str, str]) -> dict[str, str]:
    chosen = {name: environ[name] for name in sorted(environ) if name.startswith("DOVETAIL_")}
    return {name: "(hidden)" if name == _SECRET else value for name, value in chosen.items()}


def _folders(environ: Mapping[str, str]) -> dict[str, str]:
    """The folders that Dovetail writes to, with what is wrong with each."""
    return {**_socket_folder(), **_model_folder(hub_cache(environ))}


def _socket_folder() -> dict[str, str]:
    try:
        folder = tempfile.gettempdir()
    except OSError as error:
        return {"the folder for temporary files": f"there is none: {error}; set TMPDIR"}
    if len(os.fsencode(folder)) > _MAX_SOCKET_PATH:
        what = f"is longer than {_MAX_SOCKET_PATH} bytes, too long for sockets; set TMPDIR"
        return {folder: what}
    return {folder: ""}


def _model_folder(folder: Path) -> dict[str, str]:
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if os.access(there, os.W_OK) and there.is_dir():
        return {str(folder): ""}
    what = f"cannot be written ({there}): models cannot be downloaded; set HF_HOME"
    return {str(folder): what}
