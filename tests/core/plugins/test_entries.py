"""Reading metadata, and the allow list."""

from __future__ import annotations

import sys

import pytest

from dovetail.core.plugins.entries import AllowList, Entry, installed_entries
from tests.core.plugins.conftest import Fakes


def entry(name: str, distribution: str) -> Entry:
    return Entry(
        group="dovetail.platforms", name=name, value="m:x", distribution=distribution, version="1"
    )


def test_dovetails_own_entries_are_found_once() -> None:
    found = [e for e in installed_entries() if e.name == "null"]
    assert [(e.distribution, e.group, e.builtin) for e in found] == [
        ("dovetail", "dovetail.platforms", True)
    ]


def test_an_entry_knows_its_package_and_nothing_is_imported(fakes: Fakes) -> None:
    fakes.install("dovetail-acme", "raise RuntimeError")
    (found,) = [e for e in fakes.entries() if e.name == "acme"]
    assert found.origin == "dovetail-acme 1.2"
    assert "fake_dovetail_acme" not in sys.modules


def test_a_distribution_that_is_on_the_path_twice_counts_once(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    fakes.install("dovetail-acme", "")
    monkeypatch.syspath_prepend(fakes.folder.parent / fakes.folder.name / ".")
    assert [e.name for e in fakes.entries()].count("acme") == 1


def test_what_is_installed_meanwhile_is_found_and_else_nothing_is_read_again(fakes: Fakes) -> None:
    before = installed_entries()
    assert installed_entries() is before
    fakes.install("dovetail-acme", "")
    assert {e.name for e in installed_entries()} - {e.name for e in before} == {"acme"}
    (fakes.folder / "dovetail_acme-1.2.dist-info").rename(fakes.folder / "gone")
    assert installed_entries() == before


@pytest.mark.parametrize("text", ["[dovetail.platforms]\nthis is not a pair\n", "no section = 1"])
def test_a_package_with_unreadable_metadata_is_reported_and_hurts_nobody(
    fakes: Fakes, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    fakes.install("dovetail-bad", "")
    (fakes.folder / "dovetail_bad-1.2.dist-info" / "entry_points.txt").write_text(text)
    fakes.install("dovetail-acme", "")
    assert "acme" in [e.name for e in fakes.entries()]
    assert "unreadable metadata" in caplog.text or text.startswith("no section")


def test_without_the_variable_everything_is_admitted() -> None:
    assert AllowList.from_environ({}).admits(entry("acme", "dovetail-acme"))


@pytest.mark.parametrize("text", ["", " , "])
def test_an_empty_variable_admits_only_the_built_ins(text: str) -> None:
    allowed = AllowList.from_environ({"DOVETAIL_PLUGINS": text})
    assert not allowed.admits(entry("acme", "dovetail-acme"))
    assert allowed.admits(entry("null", "dovetail"))


@pytest.mark.parametrize("text", ["acme", "other, acme", "dovetail-acme", "Dovetail_Acme"])
def test_an_item_is_a_name_or_a_distribution(text: str) -> None:
    allowed = AllowList.from_environ({"DOVETAIL_PLUGINS": text})
    assert allowed.admits(entry("acme", "dovetail-acme"))
    assert not allowed.admits(entry("beta", "dovetail-beta"))


def test_items_that_nothing_answers_to_are_known() -> None:
    allowed = AllowList.from_environ({"DOVETAIL_PLUGINS": "acme,acne"})
    assert allowed.unknown([entry("acme", "dovetail-acme")]) == ("acne",)
