"""Each planted slip is found in less than a minute, and the code as it is passes the same runs."""

from __future__ import annotations

import logging
import time

import pytest
from hypothesis import Phase

from dovetail.core.simulate.workload import draw
from dovetail.core.simulate.world import Failure, run
from tests.core.kv.test_pool_machine import walk
from tests.core.simulate.planted import SLIPS, Slip, plant

SEEDS = 400
WALKS = 150
LIMIT_S = 60.0


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "dovetail.core.engine.core")


def simulate(seeds: int) -> tuple[int, Failure] | None:
    """The first seed that fails."""
    for seed in range(seeds):
        failure = run(draw(seed)).failure
        if failure is not None:
            return seed, failure
    return None


@pytest.mark.parametrize("slip", SLIPS, ids=lambda slip: slip.name)
def test_a_planted_bug_is_found(slip: Slip, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(slip, monkeypatch)
    begin = time.monotonic()
    if slip.by_machine:
        with pytest.raises(BaseException) as found:
            walk(WALKS, phases=(Phase.generate,))
        what: object = found.value
        assert not isinstance(what, TypeError | AttributeError), "the walk itself is broken"
    else:
        what = simulate(SEEDS)
        assert what is not None, f"{SEEDS} seeds do not notice: {slip.name}"
    seconds = time.monotonic() - begin
    print(f"{slip.name}: {seconds:.1f} s: {str(what)[:160]}")
    assert seconds < LIMIT_S
