"""Emulations of optional packages, importable by the tests of this folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashAttention and FlashInfer are installed, as far as this test sees."""
    from emulated_cuda import MODULES
    from emulated_cuda.infer import Wrapper

    Wrapper.made.clear()
    for module in MODULES:
        monkeypatch.setitem(sys.modules, module.__name__, module)
