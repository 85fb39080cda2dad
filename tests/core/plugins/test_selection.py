"""Which platform is chosen, why, and what the user is told when none can be."""

from __future__ import annotations

import pytest

from dovetail.core.errors import PluginError, SelectionError
from dovetail.core.plugins import selection
from dovetail.core.plugins.selection import (
    choose,
    environment,
    load_platform,
    select_platform,
    survey_platforms,
    unknown_plugins,
)
from tests.core.plugins.conftest import Fakes

ABSENT = 'return ProbeResult(usable=False, reason="no card")'


def test_the_highest_priority_among_usable_ones_wins(fakes: Fakes) -> None:
    fakes.platform("slow", priority=1)
    fakes.platform("fast", priority=5)
    fakes.platform("gone", priority=9, probe=ABSENT)
    chosen = select_platform(None, {})
    assert chosen.name == "fast"
    assert chosen.reason == "automatic: highest priority (5) of 2 usable; 2 cards"
    assert {report.name for report in chosen.reports} == {"slow", "fast", "gone", "null"}


def test_a_platform_without_priority_is_never_chosen_by_itself(fakes: Fakes) -> None:
    fakes.platform("shy", priority=None)
    with pytest.raises(SelectionError, match="usable, but only when it is named"):
        select_platform(None, {})
    assert select_platform("shy", {}).name == "shy"


def test_the_flag_beats_the_variable_and_the_variable_beats_priority(fakes: Fakes) -> None:
    fakes.platform("slow", priority=1)
    fakes.platform("fast", priority=5)
    environ = {"DOVETAIL_DEVICE": "slow"}
    by_variable = select_platform(None, environ)
    assert (by_variable.name, by_variable.reason) == ("slow", "named by DOVETAIL_DEVICE")
    by_flag = select_platform("null", environ)
    assert (by_flag.name, by_flag.reason) == ("null", "named by --device")
    unnamed = select_platform("auto", environ)
    assert unnamed.name == "slow", "auto is what a config says that names no device"
    assert select_platform("auto", {}).name == "fast"
    assert select_platform(None, {"DOVETAIL_DEVICE": ""}).name == "fast"


def test_a_named_platform_is_probed_alone(fakes: Fakes) -> None:
    mark = fakes.folder / "ran"
    fakes.platform("other", probe=f"open({str(mark)!r}, 'w')")
    fakes.platform("acme")
    chosen = select_platform(" ACME ", {})
    assert [report.name for report in chosen.reports] == ["acme"]
    assert not mark.exists()


@pytest.mark.parametrize(
    ("probe", "expected"),
    [(ABSENT, "cannot be used here: no card"), ("sys.exit(3)", r"is broken: .*sys\.exit\(3\)")],
)
def test_a_named_platform_that_is_unusable_is_an_error_and_no_fall_back(
    fakes: Fakes, probe: str, expected: str
) -> None:
    fakes.platform("acme", probe=probe)
    fakes.platform("good")
    with pytest.raises(SelectionError, match=expected) as caught:
        select_platform("acme", {})
    assert "'acme' (dovetail-acme 1.2), named by --device" in str(caught.value)
    assert "Usable here: good, null." in str(caught.value)


def test_equal_priorities_are_an_error_naming_both_and_the_flag(fakes: Fakes) -> None:
    fakes.platform("acme")
    fakes.platform("beta")
    with pytest.raises(SelectionError, match="same priority, 10") as caught:
        select_platform(None, {})
    message = str(caught.value)
    assert "acme (dovetail-acme 1.2) and beta (dovetail-beta 1.2)" in message
    assert "--device acme" in message


def test_an_unknown_name_lists_the_known_ones_and_how_to_install_it(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "_platform_extras", lambda: ["gizmo"])
    fakes.platform("acme")
    with pytest.raises(SelectionError, match=r"no platform 'acm'; known: acme, null\.$"):
        select_platform("acm", {})
    with pytest.raises(SelectionError, match=r"pip install 'dovetail\[gizmo\]'"):
        select_platform("gizmo", {})
    with pytest.raises(SelectionError, match=r"To install one: pip install 'dovetail\[gizmo\]'"):
        select_platform(None, {"DOVETAIL_PLUGINS": ""})


def test_the_installable_platforms_come_from_dovetails_own_metadata() -> None:
    extras = selection._platform_extras()
    assert "cpu" in extras
    assert "dev" not in extras


def test_a_clash_is_an_error_only_for_the_name_it_is_about(fakes: Fakes) -> None:
    fakes.platform("acme", distribution="one", priority=99)
    fakes.platform("acme", distribution="two", priority=99)
    fakes.platform("good")
    assert select_platform(None, {}).name == "good"
    with pytest.raises(PluginError, match=r"offered by one 1\.2 and two 1\.2"):
        select_platform("acme", {})


def test_the_allow_list_is_applied_before_any_code_runs(fakes: Fakes) -> None:
    mark = fakes.folder / "ran"
    fakes.install("dovetail-spy", f"open({str(mark)!r}, 'w')", name="spy")
    fakes.platform("acme")
    environ = {"DOVETAIL_PLUGINS": "acme"}
    assert [report.name for report in survey_platforms(environ)] == ["acme", "null"]
    with pytest.raises(SelectionError, match="DOVETAIL_PLUGINS does not name it"):
        select_platform("spy", environ)
    assert not mark.exists()


def test_unknown_names_in_the_allow_list_are_reported(fakes: Fakes) -> None:
    fakes.platform("acme")
    assert unknown_plugins({"DOVETAIL_PLUGINS": "acme"}) is None
    assert unknown_plugins({"DOVETAIL_PLUGINS": "acme,acne"}) == (
        "DOVETAIL_PLUGINS names 'acne', which no installed package offers."
    )


def test_choosing_among_reports_runs_nothing(fakes: Fakes) -> None:
    fakes.platform("acme")
    reports = survey_platforms({})
    assert choose(reports, "acme", {}).name == "acme"
    with pytest.raises(SelectionError, match="no platform 'acmes'"):
        choose(reports, "acmes", {})


def test_a_platform_is_loaded_by_name() -> None:
    assert load_platform("null").name == "null"


@pytest.mark.parametrize(
    ("create", "reason"),
    [
        ("raise OSError('libacme.so')", "failed to start: OSError: libacme.so"),
        ("sys.exit(2)", r"failed to start: it called sys\.exit\(2\)"),
        ("return 3", "made a int, which is not a Platform"),
        (
            "return type('P', (Platform,), dict.fromkeys(Platform.__abstractmethods__))()",
            "no Capabilities",
        ),
    ],
)
def test_every_failure_to_create_names_package_and_version(
    fakes: Fakes, create: str, reason: str
) -> None:
    fakes.platform("acme", create=create)
    with pytest.raises(PluginError, match=reason) as caught:
        load_platform("acme", {})
    assert "'acme' (dovetail-acme 1.2, fake_dovetail_acme:PLUGIN)" in str(caught.value)


def test_loading_refuses_another_interface_version(fakes: Fakes) -> None:
    fakes.platform("acme", api="99")
    with pytest.raises(PluginError, match="interface 99; this Dovetail has 1"):
        load_platform("acme", {})


def test_the_environment_of_a_platform(fakes: Fakes) -> None:
    fakes.platform("acme", environment="{'ACME_MODE': '1'}")
    assert environment("acme", {}) == {"ACME_MODE": "1"}
    assert environment("null", {}) == {}
