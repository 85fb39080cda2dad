"""Outcomes, known gaps, certificates and reports."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from dovetail.core.conformance.base import Check, expect, require
from dovetail.core.conformance.catalogue import catalogue, chosen
from dovetail.core.conformance.certify import Certificate, Plan, certify, plan_checks
from dovetail.core.conformance.gaps import KnownGaps
from dovetail.core.conformance.outcome import Outcome, Status, outcome_of, stale_gaps
from dovetail.core.conformance.report import as_json, as_text, listing
from dovetail.core.conformance.shelf import Shelf
from dovetail.core.conformance.subject import Subject
from dovetail.core.errors import ConfigError, SelectionError
from dovetail.core.plugins.entries import Entry
from tests.core.conformance.subjects import broken


def _pass(subject: Any) -> None:
    expect(True, "")


def _fail(subject: Any) -> None:
    expect(False, "wanted 1, got 2")


def _unsupported(subject: Any) -> None:
    require(False, "there are no such things here")


def _crash(subject: Any) -> None:
    raise ValueError("bad\nluck")


def check(name: str, function: Any, level: int = 1) -> Check:
    return Check(name=name, level=level, statement=f"{name} works.", function=function)


CHECKS = [
    check("a.pass", _pass),
    check("a.fail", _fail),
    check("b.unsupported", _unsupported, 2),
    check("b.crash", _crash, 2),
]
GAPS = KnownGaps({"a.fail": "slow chip", "b.*": "not yet"}, "gaps.txt")


def statuses(gaps: KnownGaps) -> list[str]:
    return [outcome_of(None, each, gaps).status for each in CHECKS]  # type: ignore[arg-type]


def test_statuses() -> None:
    assert statuses(KnownGaps()) == ["pass", "fail", "unsupported", "fail"]
    assert statuses(GAPS) == ["pass", "gap", "unsupported", "gap"]


def test_reasons_are_one_line_and_say_where() -> None:
    outcome = outcome_of(None, CHECKS[3], KnownGaps())  # type: ignore[arg-type]
    assert outcome.reason.startswith("ValueError: bad luck (line ")
    assert "test_outcomes.py" in outcome.reason


def test_a_gap_that_passes_is_a_failure() -> None:
    gaps = KnownGaps({"a.pass": "slow chip"}, "gaps.txt")
    outcome = outcome_of(None, CHECKS[0], gaps)  # type: ignore[arg-type]
    assert outcome.status == "fail"
    assert "gaps.txt says: slow chip. Remove the line" in outcome.reason


def test_a_line_that_fits_nothing_is_a_failure() -> None:
    gaps = KnownGaps({"a.fail": "x", "c.*": "y"}, "gaps.txt")
    (stale,) = stale_gaps(gaps, CHECKS)
    assert (stale.name, stale.status) == ("known_gaps.c.*", "fail")


def test_lines() -> None:
    text = "# a comment\n\nops.gelu.*: by a table: 8 bits\n  a.b :  c \n"
    assert KnownGaps.parse(text, "f").lines == {"ops.gelu.*": "by a table: 8 bits", "a.b": "c"}


@pytest.mark.parametrize("line", ["ops.gelu", "ops.gelu:", ": why", "a: b\na: c"])
def test_lines_that_are_wrong(line: str) -> None:
    with pytest.raises(ConfigError, match=r"gaps\.txt, line"):
        KnownGaps.parse(line, "gaps.txt")


def test_a_plugin_ships_its_gaps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = Entry(
        group="dovetail.platforms",
        name="acme",
        value="acme_gaps.platform:PLUGIN",
        distribution="acme",
        version="1",
    )
    assert KnownGaps.of(entry).lines == {}
    package = tmp_path / "acme_gaps"
    package.mkdir()
    (package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    assert KnownGaps.of(entry).lines == {}
    (package / "known_gaps.txt").write_text("ops.*: no ops\n")
    assert KnownGaps.of(entry).lines == {"ops.*": "no ops"}
    sys.modules.pop("acme_gaps", None)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        KnownGaps.read(tmp_path / "nothing.txt")


def outcome(status: Status, level: int = 1, name: str = "x.y") -> Outcome:
    return Outcome(name=name, level=level, statement="It works.", status=status, reason="so")


def certificate(*outcomes: Outcome, complete: bool = True) -> Certificate:
    return Certificate(platform="acme", origin="acme 1", outcomes=outcomes, complete=complete)


def test_what_passes() -> None:
    assert certificate(outcome("pass"), outcome("gap"), outcome("unsupported")).passed
    assert not certificate(outcome("pass"), outcome("fail")).passed
    assert not certificate(outcome("unsupported")).passed


def test_verdicts_by_level() -> None:
    good, bad = outcome("pass"), outcome("fail", 2)
    assert certificate(good, bad, outcome("pass", 3)).verdicts() == {1: True, 2: False, 3: False}
    assert certificate(good, outcome("unsupported", 2)).verdicts() == {1: True, 2: False}
    assert certificate(good, outcome("pass", 2), outcome("gap", 2)).verdicts() == {1: True, 2: True}


def test_report() -> None:
    text = as_text(
        certificate(
            outcome("pass", 1, "a.one"),
            outcome("gap", 2, "b.two"),
            *(outcome("unsupported", 2, f"b.{i}") for i in range(6)),
            outcome("fail", 2, "c.three"),
        )
    )
    assert "acme (acme 1)" in text
    assert "b.0, b.1, b.2, b.3 and 2 more" in text
    assert text.index("Known gaps") < text.index("b.two") < text.index("Failed")
    assert "c.three: It works." in text
    assert "1 passed, 1 failed, 6 unsupported, 1 known gaps" in text
    assert "Level 1, the contract: nothing is computed: passed" in text
    assert "Level 2, ops, attention and collectives, one by one: not passed" in text
    some = as_text(certificate(outcome("pass"), complete=False))
    assert "certifies nothing" in some and "Level 1" not in some


def test_json() -> None:
    found = json.loads(as_json(certificate(outcome("pass"), outcome("fail", 2))))
    assert (found["passed"], found["levels"]) == (False, {"1": True, "2": False})
    assert found["counts"] == {"pass": 1, "fail": 1}
    assert found["checks"][1]["reason"] == "so"


def test_listing() -> None:
    lines = listing(CHECKS).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("2  b.unsupported  ")


def test_choosing() -> None:
    def names(*only: str) -> list[str]:
        return [each.name for each in chosen(CHECKS, only)]

    assert names() == [each.name for each in CHECKS]
    assert names("a") == ["a.pass", "a.fail"]
    assert names("*.crash", "a.pass") == ["a.pass", "b.crash"]
    assert names("a.pas") == []


def test_progress_is_told() -> None:
    told: list[Any] = []
    plan = Plan(checks=CHECKS, gaps=KnownGaps(), stale=[])

    class Stub:
        name = "acme"
        entry = Entry(group="g", name="acme", value="a:b", distribution="acme", version="1")

    result = certify(
        Stub(),  # type: ignore[arg-type]
        plan,
        lambda *state: told.append(state),
        complete=True,
    )
    assert [done for done, _, _ in told] == [0, 1, 2, 3]
    assert told[3] == (3, 4, "b.crash")
    assert result.count("fail") == 2


def test_names_are_unique_and_levels_right(shelf: Shelf) -> None:
    subject = Subject.named("reference", shelf)
    checks = catalogue(subject)
    names = [each.name for each in checks]
    assert len(set(names)) == len(names) > 300
    assert all(each.statement.endswith(".") for each in checks)
    for level in (1, 2):
        part = catalogue(subject, level)
        assert part == [each for each in checks if each.level <= level] or len(part) == sum(
            each.level <= level for each in checks
        )


def test_a_platform_that_cannot_be_made_fails_by_group(shelf: Shelf) -> None:
    def gone(self: Any) -> Any:
        raise RuntimeError("no backends today")

    platform = broken(attention_backends=gone)
    entry = Subject.named("reference", shelf).entry
    checks = catalogue(Subject(entry, shelf, platform=platform), 2)
    (failing,) = [each for each in checks if each.name.startswith("attention")]
    result = outcome_of(Subject(entry, shelf, platform=platform), failing, KnownGaps())
    assert result.status == "fail" and "no backends today" in result.reason


def test_unknown_names(shelf: Shelf) -> None:
    with pytest.raises(SelectionError, match="nobody"):
        Subject.named("nobody", shelf)
    with pytest.raises(ConfigError, match=r"called no\.such"):
        plan_checks(Subject.named("reference", shelf), only=["no.such"])
