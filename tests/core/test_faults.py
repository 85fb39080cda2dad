"""Fault points: what is ordered happens, exactly then, and nothing is ordered by mistake."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dovetail.core import faults
from dovetail.core.errors import ConfigError, InjectedError
from dovetail.core.faults import POINTS, arm, armed, fault, message_faults

SOURCE = Path(faults.__file__).parent.parent


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    yield
    arm({})


def order(text: str) -> None:
    arm({"DOVETAIL_FAULTS": text})


def hits(count: int, request: int | None = None) -> list[int]:
    """Which of so many times the point raises."""
    raised = []
    for time_number in range(1, count + 1):
        try:
            fault("runner.step", request)
        except InjectedError:
            raised.append(time_number)
    return raised


def test_nothing_happens_unless_it_is_ordered() -> None:
    arm({})
    assert hits(100) == [] and not armed("runner.step")
    order("runner.result:raise")
    assert hits(100) == [] and armed("runner.result")


@pytest.mark.parametrize(
    ("rule", "times"),
    [
        ("raise", [1, 2, 3, 4, 5, 6]),
        ("raise@4", [4]),
        ("raise@every=3", [3, 6]),
        ("raise@p=0", []),
        ("raise@p=1@2", [2]),
        ("raise@req=7", []),
    ],
)
def test_the_conditions(rule: str, times: list[int]) -> None:
    order(f" runner.step:{rule} ;")
    assert hits(6) == times


def test_only_the_request_that_is_named_is_counted() -> None:
    order("runner.step:raise@2@req=7")
    assert hits(3, request=8) == []
    assert hits(3, request=7) == [2]


def test_a_share_is_about_that_share_and_the_same_each_time() -> None:
    order("runner.step:raise@p=0.25")
    first = hits(400)
    assert 60 < len(first) < 140
    order("runner.step:raise@p=0.25")
    assert hits(400) == first


def test_a_delay_takes_its_time() -> None:
    order("runner.step:delay=0.05@1")
    begin = time.monotonic()
    fault("runner.step")
    assert time.monotonic() - begin >= 0.05


def test_messages_are_dropped_doubled_and_damaged() -> None:
    order("engine.inbox:drop@1;engine.inbox:dup@2;engine.inbox:corrupt@3")
    answers = [message_faults("engine.inbox", b"abc") for _ in range(4)]
    assert answers[0] == [] and answers[1] == [b"abc", b"abc"] and answers[3] == [b"abc"]
    assert len(answers[2]) == 1 and answers[2] != [b"abc"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("runner.stop:raise", "points: engine.inbox, engine.loop"),
        ("runner.step", "is not POINT:ACTION"),
        ("runner.step:explode", "actions: raise, delay, hang, kill"),
        ("runner.step:drop", "no action 'drop'"),
        ("runner.step:raise@soon", "none of N, every=N, p=SHARE, req=ID"),
        ("runner.step:raise@if=1", "none of N"),
        ("runner.step:delay=long", "none of N"),
        ("runner.step:raise@every=0", "none of N"),
    ],
)
def test_a_wrong_order_is_refused_and_changes_nothing(text: str, message: str) -> None:
    order("runner.step:raise@2")
    with pytest.raises(ConfigError, match=message):
        order(f"hooks:raise;{text}")
    assert hits(3) == [2] and not armed("hooks")


def test_a_process_can_be_killed_or_hung_at_a_point() -> None:
    code = "from dovetail.core.faults import arm, fault\narm()\nfault('engine.loop')\nprint('on')"
    environ = os.environ | {"DOVETAIL_FAULTS": "engine.loop:kill"}
    done = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True)
    assert done.returncode == -signal.SIGKILL
    environ |= {"DOVETAIL_FAULTS": "engine.loop:hang"}
    with pytest.raises(subprocess.TimeoutExpired):
        subprocess.run([sys.executable, "-c", code], env=environ, timeout=1.0, capture_output=True)


def test_every_point_is_somewhere_in_the_code_and_no_other() -> None:
    used = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                names = ("fault", "armed", "message_faults")
                if node.func.id in names and isinstance(node.args[0], ast.Constant):
                    used.add(node.args[0].value)
    assert used == set(POINTS)
    assert list(POINTS) == sorted(POINTS) and all(POINTS.values())


def test_a_point_costs_nearly_nothing() -> None:
    arm({})
    begin = time.process_time()
    for _ in range(100_000):
        fault("runner.step")
    assert (time.process_time() - begin) / 100_000 < 1e-6
