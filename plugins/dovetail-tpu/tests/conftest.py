"""JAX on eight simulated devices, told before it starts; the switch only while these tests run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

NUM_DEVICES = 8

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", str(NUM_DEVICES))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder for compiled programs: engines of one shape compile once."""
    return str(tmp_path_factory.mktemp("xla"))


@pytest.fixture(scope="module", autouse=True)
def simulated(compiled: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DOVETAIL_TPU_SIMULATE", str(NUM_DEVICES))
        patch.setenv("XDG_CACHE_HOME", compiled)
        yield
