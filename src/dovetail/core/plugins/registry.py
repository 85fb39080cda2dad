"""One registry over an entry-point group: names without imports, objects on use."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import SequenceMatcher
from importlib import metadata
from typing import Any, Generic, TypeVar, cast

from dovetail.core.errors import PluginError, SelectionError
from dovetail.core.plugins.entries import ALLOW_VARIABLE, AllowList, Entry, installed_entries

__all__ = [
    "LoadError",
    "Refusal",
    "Registry",
    "clash",
    "describe_error",
    "import_entry",
    "instance_of",
    "nearest",
    "subclass_of",
]

T = TypeVar("T")

Refusal = Callable[[object], str | None]
"""Tells what is wrong with a loaded object; None if it is of the right kind."""


class LoadError(Exception):
    """An entry point cannot be used; the text does not say which. Becomes a PluginError."""


class Registry(Generic[T]):
    """What one group offers, as it was when the registry was made.

    Args:
        group: Entry-point group, such as ``dovetail.platforms``.
        noun: What the group holds, for messages: ``platform``.
        refuses: Checks a loaded object before it is handed out.
        entries: Entries of any group; defaults to all that are installed.
        allowed: Entries that it does not admit are known but never imported.
    """

    def __init__(
        self,
        group: str,
        noun: str,
        refuses: Refusal,
        *,
        entries: Iterable[Entry] | None = None,
        allowed: AllowList | None = None,
    ) -> None:
        self.noun = noun
        self._refuses = refuses
        allowed = allowed or AllowList(None)
        found = installed_entries() if entries is None else entries
        known = [entry for entry in found if entry.group == group]
        self.entries = tuple(entry for entry in known if allowed.admits(entry))
        self.excluded = tuple(entry for entry in known if not allowed.admits(entry))

    def names(self) -> tuple[str, ...]:
        """Every name that is offered, sorted, each once."""
        return tuple(sorted({entry.name for entry in self.entries}))

    def entry(self, name: str) -> Entry:
        """The one entry of that name.

        Raises:
            PluginError: Two distributions offer the name.
            SelectionError: None does; the message lists the known names, nearest first.
        """
        found = [entry for entry in self.entries if entry.name == name]
        if not found:
            raise SelectionError(self.unknown(name))
        if len(found) > 1:
            raise PluginError(f"The {self.noun} {name!r} is {clash(found)}.")
        return found[0]

    def load(self, name: str) -> T:
        """Import what the name stands for.

        Raises:
            PluginError: It cannot be imported or is of the wrong type; names the package, its
                version and the entry point.
        """
        entry = self.entry(name)
        try:
            return cast(T, import_entry(entry, self._refuses))
        except LoadError as error:
            raise self.error(entry, str(error)) from error.__cause__

    def error(self, entry: Entry, what: str) -> PluginError:
        """An error that says which plug-in of which package has failed, and how."""
        return PluginError(
            f"The {self.noun} {entry.name!r} ({entry.origin}, {entry.value}) {what}."
        )

    def unknown(self, name: str) -> str:
        """The message for a name that is not among ``names``: the known ones, nearest first."""
        hidden = [entry for entry in self.excluded if entry.name == name]
        if hidden:
            return (
                f"The {self.noun} {name!r} ({hidden[0].origin}) is installed, but"
                f" {ALLOW_VARIABLE} does not name it."
            )
        known = ", ".join(nearest(name, self.names())) or "none"
        return f"There is no {self.noun} {name!r}; known: {known}."


def import_entry(entry: Entry, refuses: Refusal) -> object:
    """Import the object that an entry stands for. Raises LoadError."""
    try:
        found = metadata.EntryPoint(entry.name, entry.value, entry.group).load()
    except (Exception, SystemExit) as error:
        raise LoadError(f"cannot be imported: {describe_error(error)}") from error
    complaint = refuses(found)
    if complaint is not None:
        raise LoadError(complaint)
    return cast(object, found)


def instance_of(kind: type[Any]) -> Refusal:
    """The entry point has to name an object of this type."""

    def refuses(found: object) -> str | None:
        return None if isinstance(found, kind) else f"{_a(found)}, not a {kind.__name__}"

    return refuses


def subclass_of(kind: type[Any]) -> Refusal:
    """The entry point has to name a class that inherits from this one."""

    def refuses(found: object) -> str | None:
        if isinstance(found, type) and issubclass(found, kind):
            return None
        return f"{_a(found)}, not a class that inherits from {kind.__name__}"

    return refuses


def clash(entries: Iterable[Entry]) -> str:
    """Why none of several entries of one name is taken."""
    packages = " and ".join(entry.origin for entry in entries)
    return (
        f"offered by {packages}: uninstall all but one, or name the package to use in"
        f" {ALLOW_VARIABLE}"
    )


def nearest(name: str, known: Iterable[str]) -> list[str]:
    """The known names, those most like ``name`` first."""
    return sorted(known, key=lambda k: (-SequenceMatcher(None, name, k).ratio(), k))


def describe_error(error: BaseException) -> str:
    """An exception in one line: ``ModuleNotFoundError: No module named 'x'``."""
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r})"
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _a(found: object) -> str:
    if isinstance(found, type):
        return f"is the class {found.__name__}"
    return f"is of type {type(found).__name__}"
