"""One registry over an entry-point group."""

from __future__ import annotations

import pytest

from dovetail.core.errors import PluginError, SelectionError
from dovetail.core.plugins.entries import AllowList
from dovetail.core.plugins.registry import (
    Registry,
    describe_error,
    instance_of,
    nearest,
    subclass_of,
)
from tests.core.plugins.conftest import Fakes

GROUP = "dovetail.things"


def registry(fakes: Fakes, allowed: AllowList | None = None) -> Registry[int]:
    return Registry[int](GROUP, "thing", instance_of(int), entries=fakes.entries(), allowed=allowed)


def install(fakes: Fakes, distribution: str, source: str, name: str = "acme") -> None:
    fakes.install(distribution, source, name=name, group=GROUP, attribute="THING")


def test_a_name_is_imported_when_it_is_asked_for(fakes: Fakes) -> None:
    install(fakes, "dovetail-acme", "THING = 7")
    install(fakes, "dovetail-bad", "raise RuntimeError", name="bad")
    things = registry(fakes)
    assert things.names() == ("acme", "bad")
    assert things.load("acme") == 7


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("raise ValueError('two\\nlines')", "ValueError: two lines"),
        ("import sys; sys.exit(3)", "it called sys.exit(3)"),
        ("x = 1", "has no attribute 'THING'"),
        ("THING = 'text'", "is of type str, not a int"),
        ("THING = int", "is the class int, not a int"),
    ],
)
def test_a_broken_plugin_is_named_with_package_version_and_entry_point(
    fakes: Fakes, source: str, reason: str
) -> None:
    install(fakes, "dovetail-acme", source)
    with pytest.raises(PluginError) as caught:
        registry(fakes).load("acme")
    message = str(caught.value)
    assert "'acme' (dovetail-acme 1.2, fake_dovetail_acme:THING)" in message
    assert reason in message


def test_the_cause_is_kept_for_debugging(fakes: Fakes) -> None:
    install(fakes, "dovetail-acme", "import no_such_library")
    with pytest.raises(PluginError) as caught:
        registry(fakes).load("acme")
    assert isinstance(caught.value.__cause__, ModuleNotFoundError)


def test_a_clash_hurts_only_the_name_it_is_about(fakes: Fakes) -> None:
    install(fakes, "dovetail-acme", "THING = 1")
    install(fakes, "rival", "THING = 2")
    install(fakes, "dovetail-beta", "THING = 3", name="beta")
    things = registry(fakes)
    assert things.load("beta") == 3
    with pytest.raises(PluginError, match=r"dovetail-acme 1\.2 and rival 1\.2: uninstall"):
        things.load("acme")


def test_the_allow_list_settles_a_clash(fakes: Fakes) -> None:
    install(fakes, "dovetail-acme", "raise RuntimeError")
    install(fakes, "rival", "THING = 2")
    assert registry(fakes, AllowList(("rival",))).load("acme") == 2


def test_an_unknown_name_lists_the_known_ones_nearest_first(fakes: Fakes) -> None:
    for name in ("zeta", "acme"):
        install(fakes, f"dovetail-{name}", "THING = 1", name=name)
    with pytest.raises(SelectionError, match=r"no thing 'zet'; known: zeta, acme\."):
        registry(fakes).load("zet")


def test_an_excluded_name_is_said_to_be_excluded(fakes: Fakes) -> None:
    install(fakes, "dovetail-acme", "THING = 1")
    with pytest.raises(SelectionError, match="installed, but DOVETAIL_PLUGINS does not name it"):
        registry(fakes, AllowList(())).load("acme")


def test_subclass_of_wants_a_class() -> None:
    refuses = subclass_of(Exception)
    assert refuses(ValueError) is None
    assert (
        refuses(ValueError()) == "is of type ValueError, not a class that inherits from Exception"
    )
    assert refuses(int) == "is the class int, not a class that inherits from Exception"


def test_nearest_and_errors_in_one_line() -> None:
    assert nearest("cud", ["zzz", "cuda"]) == ["cuda", "zzz"]
    assert describe_error(KeyError()) == "KeyError"
