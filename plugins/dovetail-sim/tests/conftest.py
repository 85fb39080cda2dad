"""The simulated device takes torch's one slot for devices of others: once, for the process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from dovetail_sim.device import Hardware, hardware, missing


@pytest.fixture
def device() -> Iterator[Hardware]:
    """The devices, with nothing ordered to fail; skips where torch cannot have them."""
    reason = missing()
    if reason is not None:
        pytest.skip(reason)
    made = hardware()
    made.faults.clear()
    yield made
    made.faults.clear()
    made.synchronize()
