"""The platform that is looked at, made when it is first needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar

from dovetail.core.conformance.base import require
from dovetail.core.conformance.shelf import Shelf
from dovetail.core.contracts.platform import Capabilities, Platform, PlatformPlugin
from dovetail.core.contracts.workbench import Workbench
from dovetail.core.plugins.entries import Entry
from dovetail.core.plugins.selection import load_platform, platform_registry

if TYPE_CHECKING:
    from dovetail.core.conformance.engine import Engine

__all__ = ["Subject"]

T = TypeVar("T")


class Subject:
    """One platform, and what the checks of it share. Belongs to whoever closes it.

    Args:
        entry: Where it is installed.
        shelf: Models; several subjects may share one.
        platform: The platform, if it is made already; otherwise the entry's plug-in makes it.
        environ: The environment of the process.
    """

    def __init__(
        self,
        entry: Entry,
        shelf: Shelf,
        *,
        platform: Platform | None = None,
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self.entry = entry
        self.name = entry.name
        self.shelf = shelf
        self.environ = environ
        self._platform = platform
        self._error: Exception | None = None
        self._engine: Engine | None = None
        self._known: dict[str, Any] = {}

    @classmethod
    def named(cls, name: str, shelf: Shelf, environ: Mapping[str, str] = os.environ) -> Subject:
        """The installed platform of that name. Raises SelectionError or PluginError."""
        return cls(platform_registry(environ).entry(name), shelf, environ=environ)

    @cached_property
    def plugin(self) -> PlatformPlugin:
        """What the entry point names. Raises PluginError."""
        return platform_registry(self.environ).load(self.name)

    @property
    def platform(self) -> Platform:
        """Made once, with the variables that it wants. Raises what making it raised."""
        if self._error is not None:
            raise self._error
        if self._platform is None:
            try:
                for name, value in self.plugin.environment.items():
                    os.environ.setdefault(name, value)
                self._platform = load_platform(self.name, self.environ)
            except Exception as error:
                self._error = error
                raise
        return self._platform

    @property
    def capabilities(self) -> Capabilities:
        """What the platform says that it can do."""
        return self.platform.capabilities

    @cached_property
    def workbench(self) -> Workbench:
        """The platform taken apart. Raises UnsupportedError if it cannot be."""
        return self.platform.workbench()

    def once(self, name: str, find_out: Callable[[], T]) -> T:
        """What several checks look at: found out by the first of them."""
        if name not in self._known:
            self._known[name] = find_out()
        found: T = self._known[name]
        return found

    def needs(self, feature: str) -> None:
        """Raise UnsupportedError unless the platform has the feature."""
        require(
            feature in self.capabilities.features, f"{feature} is not among the platform's features"
        )

    def needs_dtype(self, dtype: str) -> None:
        """Raise UnsupportedError unless the platform computes in the dtype."""
        known = self.capabilities.dtypes
        require(dtype in known, f"the platform computes in {', '.join(known)}")

    def engine(self) -> Engine:
        """The Llama model in float32, loaded once for all checks that need nothing special."""
        from dovetail.core.conformance.engine import Engine

        if self._engine is None or self._engine.broken:
            self.drop_engine()
            self._engine = Engine(self, "llama")
        return self._engine

    def open(self, family: str, **settings: Any) -> Engine:
        """A model of its own for one check, to be closed by it."""
        from dovetail.core.conformance.engine import Engine

        return Engine(self, family, **settings)

    def drop_engine(self) -> None:
        """Close the shared engine, if there is one."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.close()

    def close(self) -> None:
        """Close what is open. The shelf is not the subject's."""
        self.drop_engine()
