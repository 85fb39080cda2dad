"""The simulator: seeds without a fault, the same trace each time, and failures that replay."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import sys

import pytest

from dovetail.core.simulate.__main__ import main
from dovetail.core.simulate.shrink import keep, shrink
from dovetail.core.simulate.workload import Scenario, draw
from dovetail.core.simulate.world import run
from tests.core.simulate.planted import SLIPS, plant

SEEDS = 80


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "dovetail.core.engine.core")


def test_seeds_go_well() -> None:
    failures = []
    seen: dict[str, int] = {}
    for seed in range(SEEDS):
        outcome = run(draw(seed))
        if outcome.failure is not None:
            failures.append((seed, outcome.failure))
        for line in outcome.trace:
            for word in ("abort", "not_finite", "raise_in_result", "die", "row_fails", " error"):
                seen[word] = seen.get(word, 0) + (word in line)
            seen["drafts"] = seen.get("drafts", 0) + bool(re.match(r"  \d+: \[\d+, ", line))
    assert failures == []
    assert all(seen[word] > 20 for word in seen), f"the seeds do not bring everything: {seen}"


def test_the_seeds_bring_every_setting_and_pressure() -> None:
    knobs = [draw(seed).knobs for seed in range(100)]
    for name in ("enable_prefix_caching", "mixed_batches", "enable_chunked_prefill", "policy"):
        assert len({getattr(knob.scheduler, name) for knob in knobs}) == 2
    assert {knob.steps_ahead for knob in knobs} == {0, 1}
    assert len({knob.scheduler.window for knob in knobs}) > 2
    assert sum(run(draw(seed)).num_preemptions for seed in range(20)) > 60


def digest(scenario: Scenario) -> str:
    return hashlib.sha256("\n".join(run(scenario).trace).encode()).hexdigest()


def test_a_seed_gives_the_same_trace_byte_for_byte() -> None:
    want = [digest(draw(seed)) for seed in range(4)]
    assert [digest(draw(seed)) for seed in range(4)] == want
    assert len(set(want)) == 4
    code = (
        "from tests.core.simulate.test_simulate import digest, draw\n"
        "print(*[digest(draw(seed)) for seed in range(4)])\n"
    )
    for hash_seed in ("1", "77"):
        environ = os.environ | {"PYTHONHASHSEED": hash_seed}
        out = subprocess.check_output([sys.executable, "-c", code], env=environ, text=True)
        assert out.split() == want


def test_a_failing_seed_is_told_shrunk_and_replays(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    slip = next(slip for slip in SLIPS if slip.name == "leak on preemption during prefill")
    plant(slip, monkeypatch)
    assert main(["--seeds", "50"]) == 1
    text = capsys.readouterr().out
    first = re.search(r"seed=(\d+) failed: (.*)", text)
    again = re.search(r"fail: python -m dovetail\.core\.simulate (.*)", text)
    assert first and again
    assert main(again.group(1).split()) == 1
    assert "failed: InvariantError" in capsys.readouterr().out
    assert main(["--seeds", "1", "--start", first.group(1), "--steps"]) == 1
    assert first.group(2) in capsys.readouterr().out, "the same failure again"
    scenario = draw(int(first.group(1)))
    kept = shrink(scenario)
    assert len(kept) < len(scenario.events)
    assert run(keep(scenario, kept)).failure is not None
    for index in kept:
        fewer = [other for other in kept if other != index]
        assert run(keep(scenario, fewer)).failure is None, "no event can be left out"


def test_the_command_says_that_all_went_well(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--seeds", "3", "--start", "7"]) == 0
    assert "3 seeds" in capsys.readouterr().out
