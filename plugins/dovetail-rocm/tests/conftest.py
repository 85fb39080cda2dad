"""An emulation of an optional package, importable by the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """AITER is installed, as far as this test sees."""
    from emulated_rocm import MODULE

    monkeypatch.setitem(sys.modules, MODULE.__name__, MODULE)
