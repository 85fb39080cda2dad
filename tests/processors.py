"""Logits processors of packages that are installed for the length of a test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.core.plugins.conftest import Fakes

__all__ = ["installed"]


@contextmanager
def installed(folder: Path, source: str, *classes: str) -> Iterator[Path]:
    """One package ``acme-NAME`` for each class of the source, under its name in lower case."""
    fakes = Fakes(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        for name in classes:
            fakes.install(
                f"acme-{name.lower()}",
                source,
                name=name.lower(),
                group="dovetail.logits_processors",
                attribute=name,
            )
        try:
            yield folder
        finally:
            for module in fakes.modules:
                sys.modules.pop(module, None)
