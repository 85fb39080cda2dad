"""Profiles from steps that are made up."""

import json
from xml.etree import ElementTree

import numpy as np
import pytest

from dovetail.core.bench.op_clock import OpTime, StepOps
from dovetail.core.bench.profile import HOST, REST, profile_phase
from dovetail.core.bench.profile_plot import profile_plot
from dovetail.core.bench.profile_table import profile_table
from dovetail.core.bench.roofline import LayerCost, Span, StepCost
from dovetail.core.bench.steps import StepTime
from dovetail.core.contracts.platform import Rates

COST = StepCost(
    weight_bytes=1300,
    layer_flops=10,
    head_flops=5,
    spans=(Span(window=None, kv_bytes=4, flops=3),),
    layers=(
        LayerCost(name="down", weight_bytes=900, flops=10),
        LayerCost(name="norms", weight_bytes=100, flops=0),
        LayerCost(name="lm_head", weight_bytes=300, flops=5, is_head=True),
    ),
)
RATES = Rates(read_bytes_per_second=1000, matrix_flops_per_second=100)


def step(seconds, times=None, *, query=(1, 1), context=(20, 5), num_places=2):
    """Starting takes all but a tenth, waiting nothing."""
    ops = StepOps(
        query_lens=np.array(query, np.int32),
        context_lens=np.array(context, np.int32),
        num_places=num_places,
        is_watched=times is not None,
        times=times or {},
    )
    return StepTime(seconds, seconds * 0.9, 0.0, len(query), sum(query)), ops


@pytest.fixture
def profile():
    times = {"down": OpTime(4, 3.0, 50), "attention": OpTime(2, 1.0), "sampling": OpTime(1, 0.5, 8)}
    longer = {"down": OpTime(4, 5.0, 50), "attention": OpTime(2, 1.0)}
    steps = [step(8.0), step(10.0, times), step(6.0), step(12.0, longer), step(7.0)]
    return profile_phase(
        "decode", COST, batch_size=2, input_len=4, measured=[[one] for one in steps]
    )


def test_classes_add_up_to_the_step(profile):
    parts = {part.name: part for part in profile.classes}
    assert list(parts) == ["down", "attention", "sampling", "norms", "lm_head", REST, HOST]
    assert [part.seconds for part in profile.classes] == pytest.approx(
        [4.0, 1.0, 0.25, 0, 0, 0.9 * 11 - 5.25, 0.1 * 11]
    )
    assert profile.seconds == pytest.approx(11)
    assert (profile.plain, profile.watched) == (7.0, 11.0)
    assert (profile.num_measured, profile.steps_each) == (2, 1)
    assert (parts["down"].calls, parts["sampling"].calls) == (4, 0.5)


def test_a_step_that_was_held_up_does_not_count():
    steps = [
        step(1.0),
        *(step(seconds, {"down": OpTime(1, seconds / 2)}) for seconds in (3, 99, 2)),
    ]
    found = profile_phase(
        "decode", COST, batch_size=2, input_len=4, measured=[[one] for one in steps]
    )
    assert (found.num_measured, found.watched, found.classes[0].seconds) == (3, 3, 1.5)
    assert found.seconds == pytest.approx(3)


def test_what_a_class_reached(profile):
    parts = {part.name: part for part in profile.classes}
    down, attention = parts["down"], parts["attention"]
    assert (down.num_bytes, down.least.num_bytes, down.least.flops) == (950, 900, 20)
    assert down.read_fraction(RATES) == pytest.approx(950 / 4.0 / 1000)
    assert down.matrix_fraction(RATES) == pytest.approx(20 / 4.0 / 100)
    assert (attention.num_bytes, attention.least.flops) == (25 * 4, 25 * 3)
    assert parts["sampling"].num_bytes == 4
    assert parts["sampling"].matrix_fraction(RATES) is None
    assert parts[HOST].read_fraction(RATES) is None
    bound = max((1300 + 100) / 1000, (20 + 10 + 75) / 100)
    assert profile.least.seconds(RATES) == pytest.approx(bound)
    assert profile.as_json(RATES)["roofline_fraction"] == pytest.approx(bound / 7)


def test_prompts_in_several_steps():
    first = step(4.0, {"down": OpTime(1, 3.0)}, query=(6,), context=(6,), num_places=0)
    last = step(2.0, {"down": OpTime(1, 1.0)}, query=(2,), context=(8,), num_places=1)
    plain = [step(3.0), step(2.5)]
    found = profile_phase(
        "prefill", COST, batch_size=1, input_len=8, measured=[plain, [first, last]]
    )
    parts = {part.name: part for part in found.classes}
    assert (found.plain, found.watched, found.steps_each) == (5.5, 6.0, 2)
    assert (parts["down"].calls, parts["down"].seconds, parts["down"].num_bytes) == (2, 4.0, 1800)
    assert parts["attention"].least.flops == 3 * sum(range(1, 9))
    assert (parts["lm_head"].num_bytes, parts["lm_head"].least.flops) == (300, 5)
    assert "prefill, 1 request of 8 tokens: 5500.00 ms in 2 steps" in profile_table(found, None)


def test_json(profile):
    result = json.loads(json.dumps(profile.as_json(RATES)))
    assert set(result) == {
        "phase", "batch_size", "input_len", "num_measured", "steps_each", "seconds",
        "plain_seconds_median", "watched_seconds_median", "roofline_seconds",
        "roofline_fraction", "classes",
    }  # fmt: skip
    assert all(
        set(part) == {
            "name", "calls", "seconds", "share", "bytes", "operations", "roofline_seconds",
            "read_fraction", "matrix_fraction",
        }
        for part in result["classes"]
    )  # fmt: skip
    assert sum(part["share"] for part in result["classes"]) == pytest.approx(1)
    without = profile.as_json(None)
    assert without["roofline_seconds"] is without["roofline_fraction"] is None
    assert without["classes"][0]["read_fraction"] is None


def test_table(profile):
    shown = profile_table(profile, RATES)
    assert "decode, 2 requests of 4 tokens each: 7000.00 ms a step" in shown
    assert "Timing the ops costs +57.1%: 11000.00 ms, 7000.00 ms without (medians of 2)." in shown
    assert "Roofline 1400.00 ms, 20.0% of the time" in shown
    (down,) = (line for line in shown.splitlines() if line.startswith("down"))
    assert down.split() == ["down", "4000.000", "36.4%", "4", "0.001", "0.000", "23.8%", "5.0%"]
    assert "Roofline" not in profile_table(profile, None)


@pytest.mark.parametrize("rates", [RATES, None])
def test_picture(profile, rates):
    root = ElementTree.fromstring(profile_plot("a <model> & more", [profile, profile], rates))
    space = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{space}svg"
    parts = [rect for rect in root.iter(f"{space}rect") if rect.get("class") == "part"]
    measured = [rect for rect in parts if rect.get("height") == "36"]
    assert len(measured) == 2 * 5
    assert sum(float(rect.get("width")) for rect in measured) == pytest.approx(2 * 712, abs=0.1)
    assert len(parts) - len(measured) == (0 if rates is None else 2 * 4)
    words = [text.text for text in root.iter(f"{space}text")]
    assert {"a <model> & more", "down", REST, HOST} <= set(words)
    width, height = map(float, root.get("viewBox").split()[2:])
    assert all(float(text.get("y")) < height for text in root.iter(f"{space}text"))
    assert all(float(rect.get("x") or 0) + float(rect.get("width")) <= width + 0.1
               for rect in root.iter(f"{space}rect"))  # fmt: skip
