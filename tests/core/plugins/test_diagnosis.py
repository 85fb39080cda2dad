"""What is serious and what is not, and that nothing is said twice."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from dovetail.core.machine import look_at_machine
from dovetail.core.plugins.diagnosis import diagnose
from dovetail.core.plugins.doctor_report import doctor_text
from dovetail.core.plugins.examination import Examination
from dovetail.core.plugins.examine import PlatformReport
from dovetail.core.plugins.health import EntryReport
from dovetail.core.plugins.selection import Selection
from dovetail.core.plugins.start import StartReport

PLATFORM = PlatformReport(
    name="acme", distribution="dovetail-acme", version="1", priority=1, probe="usable", reason="ok"
)


def examination(**changes: Any) -> Examination:
    sound: dict[str, Any] = {
        "versions": {"dovetail": "0.1.0"},
        "missing": {},
        "machine": look_at_machine({}),
        "variables": {},
        "wrong_variables": (),
        "unknown": (),
        "folders": {"/tmp": ""},
        "platforms": (PLATFORM,),
        "selection": Selection(name="acme", reason="named", reports=(PLATFORM,)),
        "selection_error": "",
        "start": StartReport(name="acme", attention=["quick"]),
        "entries": (),
        "kept_out": (),
    }
    return Examination(**(sound | changes))


def entry(state: str, *, group: str = "dovetail.models", origin: str = "pkg") -> EntryReport:
    return EntryReport(
        group=group,
        name="thing",
        value="m:T",
        distribution=origin,
        version="1",
        state=state,  # type: ignore[arg-type]
        reason="it is bad",
    )


def test_nothing_is_wrong() -> None:
    assert diagnose(examination()) == ()
    assert doctor_text(examination(), ()).endswith("No problem was found.")


def test_nodes_are_told_where_there_are_several() -> None:
    machine = look_at_machine({})
    text = doctor_text(examination(machine=replace(machine, num_nodes=2)), ())
    assert f"{machine.num_cores} cores on 2 NUMA nodes," in " ".join(text.split())
    text = doctor_text(examination(machine=replace(machine, num_nodes=1)), ())
    assert "NUMA" not in text


@pytest.mark.parametrize(
    ("changes", "serious"),
    [
        ({"selection": None, "selection_error": "two are equal", "start": None}, True),
        ({"start": StartReport(name="acme", error="no driver")}, True),
        ({"variables": {"DOVETAIL_ATTENTION_BACKEND": "slow"}}, True),
        ({"wrong_variables": ("X must be a number",)}, True),
        ({"unknown": ("the environment variable X is unknown",)}, False),
        ({"unknown": ("DOVETAIL_PLUGINS names 'x'",)}, True),
        ({"missing": {"dovetail": ("numpy",)}}, True),
        ({"missing": {"dovetail-acme": ("acme",)}}, False),
        ({"folders": {"/tmp": "is too long"}}, False),
        ({"entries": (entry("broken"),)}, False),
        ({"entries": (entry("broken", group="dovetail.hooks"),)}, True),
        ({"entries": (entry("broken", group="dovetail.attention_backends.jax"),)}, False),
    ],
)
def test_what_stands_in_the_way(changes: dict[str, Any], serious: bool) -> None:
    found = examination(**changes)
    (finding,) = diagnose(found)
    assert finding.serious is serious
    text = doctor_text(found, (finding,))
    assert finding.what in text
    assert finding.remedy in text


def test_a_broken_backend_that_is_wanted_is_said_once() -> None:
    broken = entry("broken", group="dovetail.attention_backends")
    variables = {"DOVETAIL_ATTENTION_BACKEND": "thing"}
    (finding,) = diagnose(examination(entries=(broken,), variables=variables))
    assert finding.serious


def test_a_name_that_two_claim_is_said_once() -> None:
    twins = (entry("claimed twice", origin="one"), entry("claimed twice", origin="two"))
    (finding,) = diagnose(examination(entries=twins))
    assert finding.what == "model thing is offered by one 1 and two 1"
    assert not finding.serious


def test_what_was_not_reached_is_shown_and_no_finding() -> None:
    found = examination(entries=(entry("not reached"), entry("kept out")))
    assert diagnose(found) == ()
    text = doctor_text(found, ())
    assert "?  thing  pkg 1 (not examined" in text
    assert "-  thing  pkg 1 (DOVETAIL_PLUGINS does not name it)" in text


def test_the_serious_come_first() -> None:
    found = diagnose(examination(entries=(entry("broken"),), wrong_variables=("X is wrong",)))
    assert [finding.serious for finding in found] == [True, False]
