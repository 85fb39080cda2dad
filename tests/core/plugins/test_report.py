"""The table of ``dovetail platforms``."""

from __future__ import annotations

import json

from dovetail.core.errors import SelectionError
from dovetail.core.plugins.examine import PlatformReport
from dovetail.core.plugins.report import platforms_json, platforms_table
from dovetail.core.plugins.selection import Selection

REPORTS = (
    PlatformReport(
        name="null",
        distribution="dovetail",
        version="0.1",
        priority=None,
        probe="usable",
        reason="x",
    ),
    PlatformReport(
        name="crashy",
        distribution="dovetail-crashy",
        version="2",
        priority=None,
        probe="broken",
        reason="its probe was ended by SIGABRT",
    ),
    PlatformReport(
        name="gone",
        distribution="dovetail-gone",
        version="1",
        priority=90,
        probe="absent",
        reason="no card",
    ),
    PlatformReport(
        name="acme",
        distribution="dovetail-acme",
        version="1.2",
        priority=50,
        probe="usable",
        reason="2 cards",
        num_devices=2,
    ),
)
SELECTION = Selection(
    name="acme", reason="automatic: the only usable platform with a priority", reports=REPORTS
)


def test_the_table_says_what_is_there_and_what_is_chosen() -> None:
    assert platforms_table(REPORTS, SELECTION).splitlines() == [
        "   name    priority  devices  package            reason",
        "+  acme    50        2        dovetail-acme 1.2  2 cards",
        "+  null    -         0        dovetail 0.1       x",
        "-  gone    90        0        dovetail-gone 1    no card",
        "!  crashy  -         0        dovetail-crashy 2  its probe was ended by SIGABRT",
        "",
        "+ usable  - absent  ! broken",
        "Chosen: acme, automatic: the only usable platform with a priority",
    ]


def test_the_table_is_printed_when_nothing_can_be_chosen() -> None:
    table = platforms_table(REPORTS, SelectionError("two are equal"))
    assert table.endswith("Chosen: none. two are equal")


def test_the_same_as_json() -> None:
    found = json.loads(platforms_json(REPORTS, SELECTION))
    assert found["selected"] == "acme"
    assert found["error"] is None
    assert found["platforms"][0] == {
        "name": "acme",
        "distribution": "dovetail-acme",
        "version": "1.2",
        "priority": 50,
        "probe": "usable",
        "reason": "2 cards",
        "num_devices": 2,
    }
    failed = json.loads(platforms_json(REPORTS, SelectionError("two are equal")))
    assert (failed["selected"], failed["error"]) == (None, "two are equal")
