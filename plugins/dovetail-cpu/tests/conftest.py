"""Helpers of these tests lie in ``cpu_kernels``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.memory import HugePages

sys.path.insert(0, str(Path(__file__).parent))

from cpu_kernels import NAMES, kernels_of


@pytest.fixture(params=NAMES)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    """Of each instruction set that this processor has."""
    return kernels_of(request.param)


@pytest.fixture(scope="session")
def memory() -> HugePages:
    """For weights."""
    return HugePages()
