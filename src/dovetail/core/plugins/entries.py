"""What installed distributions offer Dovetail, read from their metadata without importing any."""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path

__all__ = ["ALLOW_VARIABLE", "AllowList", "Entry", "installed_entries"]

ALLOW_VARIABLE = "DOVETAIL_PLUGINS"
"""Environment variable: the plug-ins whose code may run, separated by commas."""

_OWN_DISTRIBUTION = "dovetail"
_GROUP_PREFIX = "dovetail."

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One name that one distribution offers in one group. Nothing of it has been imported."""

    group: str
    """Entry-point group, such as ``dovetail.platforms``."""
    name: str
    value: str
    """Where the object is: ``module:attribute``."""
    distribution: str
    version: str

    @property
    def origin(self) -> str:
        """Package and version, for messages: ``dovetail-cpu 0.1.0``."""
        return f"{self.distribution} {self.version}"

    @property
    def builtin(self) -> bool:
        """Whether it comes with Dovetail itself."""
        return _normalized(self.distribution) == _OWN_DISTRIBUTION


@dataclass(frozen=True)
class AllowList:
    """The plug-ins whose code may run. Dovetail's own built-ins always may."""

    items: tuple[str, ...] | None
    """Names of entry points or of distributions; None admits everything."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> AllowList:
        """Read ``DOVETAIL_PLUGINS``; set but empty, it admits only the built-ins."""
        text = environ.get(ALLOW_VARIABLE)
        if text is None:
            return cls(None)
        return cls(tuple(item for item in (part.strip() for part in text.split(",")) if item))

    def admits(self, entry: Entry) -> bool:
        """Whether the entry's code may run."""
        if self.items is None or entry.builtin:
            return True
        return any(_means(item, entry) for item in self.items)

    def unknown(self, entries: Iterable[Entry]) -> tuple[str, ...]:
        """Items that no installed entry answers to."""
        known = tuple(entries)
        return tuple(
            item for item in self.items or () if not any(_means(item, entry) for entry in known)
        )


def installed_entries() -> tuple[Entry, ...]:
    """Every entry in Dovetail's groups, in order of group, name and distribution.

    A distribution that is on the path twice counts once: the first one, which Python imports too.
    Read again only after the path or a folder on it has changed: a start asks ten times.
    """
    return _entries_on(tuple((folder, _changed(folder)) for folder in sys.path))


@lru_cache(maxsize=8)
def _entries_on(path: tuple[tuple[str, int], ...]) -> tuple[Entry, ...]:
    """Of the path as it is; what is given is what distinguishes it from others."""
    names = {name for found in metadata.distributions() if (name := _contributor(found))}
    entries = (entry for name in names for entry in _entries(metadata.distribution(name)))
    return tuple(sorted(entries, key=lambda e: (e.group, e.name, e.distribution)))


def _changed(folder: str) -> int:
    """When something was last put into the folder or taken away, in ns; 0 if it is not there."""
    try:
        return Path(folder).stat().st_mtime_ns
    except OSError:
        return 0


def _contributor(distribution: metadata.Distribution) -> str | None:
    """Its name, if it offers something to Dovetail. Unreadable metadata is reported, not raised."""
    try:
        groups = {point.group for point in distribution.entry_points}
        if not any(group.startswith(_GROUP_PREFIX) for group in groups):
            return None
        return _normalized(distribution.metadata["Name"])
    except Exception as error:
        logger.warning("Ignoring an installed package with unreadable metadata: %r", error)
        return None


def _entries(distribution: metadata.Distribution) -> list[Entry]:
    told = distribution.metadata
    return [
        Entry(
            group=point.group,
            name=point.name,
            value=point.value,
            distribution=told["Name"],
            version=told["Version"],
        )
        for point in distribution.entry_points
        if point.group.startswith(_GROUP_PREFIX)
    ]


def _means(item: str, entry: Entry) -> bool:
    return item == entry.name or _normalized(item) == _normalized(entry.distribution)


def _normalized(name: str) -> str:
    """The form in which two spellings of a distribution's name are equal (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()
