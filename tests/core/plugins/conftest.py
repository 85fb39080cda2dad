"""Fake distributions: a folder with a module and its metadata, put on the path."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dovetail.core.plugins import entries, registry, selection

PLATFORM = """
import os, sys, time
from dovetail.core.contracts.platform import *
def probe():
    {probe}
def create():
    {create}
PLUGIN = PlatformPlugin(api_version={api}, probe=probe, create=create, priority={priority},
                        environment={environment})
"""


class Fakes:
    """Installs distributions into a folder that is on the path for the length of a test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names: set[str] = set()
        self.modules: list[str] = []

    def install(
        self,
        distribution: str,
        source: str,
        *,
        name: str = "acme",
        version: str = "1.2",
        group: str = "dovetail.platforms",
        attribute: str = "PLUGIN",
    ) -> str:
        """A distribution whose one module has this source; returns the entry point's value."""
        module = f"fake_{distribution.replace('-', '_')}"
        (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        metadata = f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n"
        (info / "METADATA").write_text(metadata)
        value = f"{module}:{attribute}"
        (info / "entry_points.txt").write_text(f"[{group}]\n{name} = {value}\n")
        self.names.add(distribution)
        self.modules.append(module)
        return value

    def platform(
        self,
        name: str,
        *,
        distribution: str | None = None,
        probe: str = 'return ProbeResult(usable=True, reason="2 cards", num_devices=2)',
        create: str = "raise RuntimeError('no driver')",
        api: str = "API_VERSION",
        priority: int | str | None = 10,
        environment: str = "{}",
    ) -> None:
        """A distribution with one platform."""
        source = PLATFORM.format(
            probe=probe, create=create, api=api, priority=priority, environment=environment
        )
        self.install(distribution or f"dovetail-{name}", source, name=name)

    def entries(self) -> tuple[entries.Entry, ...]:
        """What the fakes offer, and Dovetail's own null platform."""
        return tuple(
            entry
            for entry in entries.installed_entries()
            if entry.distribution in self.names or entry.name == "null"
        )


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Fakes]:
    """A world in which only fakes and the null platform are installed."""
    made = Fakes(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "installed_entries", made.entries)
    monkeypatch.setattr(selection, "installed_entries", made.entries)
    yield made
    for module in made.modules:
        sys.modules.pop(module, None)


@pytest.fixture
def environ() -> dict[str, str]:
    """An environment that says nothing about platforms."""
    return {}
