"""Helpers of these tests lie in ``cpu_kernels``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from dovetail_cpu import PLUGIN

sys.path.insert(0, str(Path(__file__).parent))
for name, value in PLUGIN.environment.items():  # before torch is loaded
    os.environ.setdefault(name, value)

from cpu_kernels import NAMES, kernels_of  # noqa: E402
from dovetail_cpu import kept  # noqa: E402
from dovetail_cpu.kernels import Kernels  # noqa: E402
from dovetail_cpu.memory import HugePages  # noqa: E402


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Of each instruction set that this processor has."""
    return kernels_of(request.param)


@pytest.fixture(scope="session")
def memory() -> HugePages:
    """For weights."""
    return HugePages()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where everything is kept, however small."""
    place = tmp_path / "cache"
    monkeypatch.setenv(kept.VARIABLE, str(place))
    monkeypatch.setattr(kept, "_LEAST", 1)
    return place
