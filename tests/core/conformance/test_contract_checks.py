"""Level 1 as a plug-in is seen from a fresh process, and what the kit knows of the contract."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dovetail.core.config.schema import EngineConfig
from dovetail.core.conformance.child import FRAMEWORKS, loaded_by
from dovetail.core.conformance.contract_checks import KV_DTYPES, checks
from dovetail.core.conformance.gaps import KnownGaps
from dovetail.core.conformance.outcome import Outcome, outcome_of
from dovetail.core.conformance.shelf import Shelf
from dovetail.core.conformance.subject import Subject
from dovetail.core.contracts import platform as contract
from dovetail.core.contracts.platform import API_VERSION, FEATURES, PlatformPlugin, ProbeResult
from dovetail.core.plugins.entries import Entry

SOURCE = """
import sys, time, os
{top}
from dovetail.core.contracts.platform import *
def probe():
    {probe}
    return ProbeResult(usable=True, reason="2 cards", num_devices=2)
PLUGIN = PlatformPlugin(api_version={api}, probe=probe, create=print)
"""


@pytest.fixture
def seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shelf: Shelf):
    """What comes of a check of a plug-in with this source."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "tensorflow.py").write_text("")

    def look(name: str, *, top: str = "", probe: str = "pass", api: str = "API_VERSION") -> Outcome:
        (tmp_path / "acme_plugin.py").write_text(SOURCE.format(top=top, probe=probe, api=api))
        entry = Entry(
            group="dovetail.platforms",
            name="acme",
            value="acme_plugin:PLUGIN",
            distribution="acme",
            version="1",
        )
        subject = Subject(entry, shelf)
        (check,) = [c for c in checks(subject) if c.name == f"contract.{name}"]
        return outcome_of(subject, check, KnownGaps())

    return look


@pytest.mark.parametrize("name", ["import", "probe", "probe_time", "probe_silent"])
def test_a_good_plugin(name: str, seen) -> None:
    outcome = seen(name)
    assert outcome.status == "pass", outcome.reason


@pytest.mark.parametrize(
    ("name", "how", "said"),
    [
        ("import", {"top": "import tensorflow"}, "tensorflow"),
        ("import", {"probe": "import tensorflow"}, "tensorflow"),
        ("import", {"top": "sys.exit(3)"}, None),
        ("probe", {"top": "import nothing_there"}, "nothing_there"),
        ("probe", {"probe": "raise RuntimeError('no driver')"}, "no driver"),
        ("probe", {"probe": "os.abort()"}, "status -6"),
        ("probe", {"probe": "return 3"}, "int"),
        ("probe", {"api": "99"}, "99"),
        ("probe", {"probe": "return ProbeResult(usable=False, reason='no card')"}, "no card"),
        ("probe", {"probe": "return ProbeResult(usable=True, reason='x')"}, "0 devices"),
        (
            "probe",
            {"probe": "return ProbeResult(usable=True, reason=' ', num_devices=1)"},
            "reason",
        ),
        ("probe_time", {"probe": "time.sleep(1.1)"}, "took 1."),
        ("probe_silent", {"probe": "print('hello')"}, "hello"),
        ("probe_silent", {"top": "os.write(1, b'noise')"}, "noise"),
    ],
)
def test_a_bad_plugin(name: str, how: dict[str, str], said: str | None, seen) -> None:
    outcome = seen(name, **how)
    if said is None:
        assert outcome.status == "pass"
        assert seen("probe", **how).status == "fail"
    else:
        assert outcome.status == "fail" and said in outcome.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"api_version": API_VERSION + 1},
        {"priority": "high"},
        {"environment": {"ACME": 1}},
        {"environment": {3: "x"}},
    ],
)
def test_the_plugin_object(changes, shelf: Shelf) -> None:
    subject = Subject.named("reference", shelf)
    fine = {"api_version": API_VERSION, "probe": lambda: ProbeResult, "create": lambda: None}
    subject.__dict__["plugin"] = PlatformPlugin(**(fine | changes))
    (check,) = [c for c in checks(subject) if c.name == "contract.plugin"]
    assert outcome_of(subject, check, KnownGaps()).status == "fail"


def test_features_are_those_of_the_contract() -> None:
    source = Path(contract.__file__).read_text()
    text = source[source.index("features: frozenset") : source.index("static_shapes: bool")]
    assert {f for f in FEATURES if f"``{f}``" in text} == FEATURES
    named = set(text.split("``")[1::2])
    assert {n for n in named if n.isidentifier() and n.islower()} == FEATURES


def test_kv_dtypes_are_those_of_the_configuration() -> None:
    for dtype in KV_DTYPES:
        assert EngineConfig(kv_cache_dtype=dtype).kv_cache_dtype == dtype


def test_frameworks_are_noticed() -> None:
    assert loaded_by(["json", "dovetail.core.batch"]) == []
    assert "torch" in loaded_by(["torch"])


def test_the_kit_imports_no_framework_and_no_pytest() -> None:
    """But for its two modules for pytest."""
    code = """
import sys
for name in ("torch", "jax", "pytest", "transformers"):
    sys.modules[name] = None
from importlib import import_module
from pathlib import Path
import dovetail.core.conformance as kit
names = {p.stem for p in Path(kit.__file__).parent.glob("*.py")} - {"test_platform", "__init__"}
for name in names:
    import_module(f"dovetail.core.conformance.{name}")
import_module("dovetail.core.cli.conformance")
print(len(names))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15
    assert {"torch", "jax"} <= set(FRAMEWORKS)
