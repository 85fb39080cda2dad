"""Probes in child processes: everything that a plug-in can do wrong is survived and reported."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dovetail.core.errors import ConfigError
from dovetail.core.plugins.examine import PlatformReport
from dovetail.core.plugins.probe import probe_deadline, probe_platforms
from tests.core.plugins.conftest import Fakes


def reports(fakes: Fakes, deadline: float = 20.0) -> dict[str, PlatformReport]:
    found = probe_platforms(fakes.entries(), os.environ, deadline=deadline)
    return {report.name: report for report in found}


def test_a_healthy_plugin_is_reported_in_full(fakes: Fakes) -> None:
    fakes.platform("acme", priority=50)
    assert reports(fakes)["acme"] == PlatformReport(
        name="acme",
        distribution="dovetail-acme",
        version="1.2",
        priority=50,
        probe="usable",
        reason="2 cards",
        num_devices=2,
    )


def test_hardware_that_is_not_there_is_absent_and_not_broken(fakes: Fakes) -> None:
    fakes.platform("acme", probe='return ProbeResult(usable=False, reason="no\\n  card")')
    report = reports(fakes)["acme"]
    assert (report.probe, report.reason, report.priority) == ("absent", "no card", 10)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"probe": "raise ImportError('libacme.so')"}, "its probe failed: ImportError: libacme.so"),
        ({"probe": "sys.exit(3)"}, "its probe failed: it called sys.exit(3)"),
        ({"probe": "os._exit(4)"}, "its probe ended with exit status 4 and no answer"),
        ({"probe": "os.abort()"}, "its probe was ended by SIGABRT"),
        ({"probe": "os.write(2, b'bad\\n'); os._exit(1)"}, "no answer: bad"),
        ({"probe": "return True, 'fine'"}, "its probe returned tuple, not ProbeResult"),
        (
            {"probe": "return ProbeResult(usable=True, reason='', num_devices='2')"},
            "its probe counts '2' devices",
        ),
        ({"api": "99"}, "is written for platform interface 99; this Dovetail has 1"),
        ({"priority": "'high'"}, "has the priority 'high', which is neither"),
        ({"priority": "1; sys.exit()"}, "cannot be imported"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_plugin_is_reported_and_the_others_stay_usable(
    fakes: Fakes, settings: dict[str, str], reason: str
) -> None:
    fakes.platform("acme", **settings)
    fakes.platform("good")
    found = reports(fakes)
    assert found["acme"].probe == "broken"
    assert reason in found["acme"].reason
    assert found["good"].probe == found["null"].probe == "usable"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_library", "ModuleNotFoundError: No module named 'no_such_library'"),
        ("import os; os.abort()", "SIGABRT"),
        ("import sys; sys.exit('no')", "it called sys.exit('no')"),
        ("PLUGIN = 3", "is of type int, not a PlatformPlugin"),
    ],
)
def test_a_module_that_fails_when_it_is_imported(fakes: Fakes, source: str, reason: str) -> None:
    fakes.install("dovetail-acme", source)
    report = reports(fakes)["acme"]
    assert report.probe == "broken"
    assert reason in report.reason


def test_noise_on_standard_output_is_no_answer(fakes: Fakes) -> None:
    fakes.platform(
        "acme",
        probe="print('@dovetail-probe@{}'); os.system('echo loud');"
        " return ProbeResult(usable=True, reason='fine')",
    )
    assert reports(fakes)["acme"].reason == "fine"


def test_a_plugin_that_leaves_a_thread_behind_is_not_waited_for(fakes: Fakes) -> None:
    fakes.platform(
        "acme",
        probe="import threading; threading.Thread(target=time.sleep, args=(60,)).start();"
        " return ProbeResult(usable=True, reason='fine')",
    )
    started = time.monotonic()
    assert reports(fakes)["acme"].probe == "usable"
    assert time.monotonic() - started < 15


def test_a_hanging_plugin_costs_the_deadline_and_is_killed_with_its_children(fakes: Fakes) -> None:
    mark = fakes.folder / "child"
    fakes.platform(
        "acme",
        probe="import subprocess; child = subprocess.Popen(['sleep', '600']);"
        f" open({str(mark)!r}, 'w').write(str(child.pid)); time.sleep(600)",
    )
    fakes.platform("good")
    started = time.monotonic()
    found = reports(fakes, deadline=3.0)
    assert time.monotonic() - started < 30
    assert found["acme"].reason.startswith("its probe did not answer within 3 s")
    assert found["good"].probe == "usable"
    assert _ended(int(mark.read_text()))


def _ended(pid: int) -> bool:
    for _ in range(200):
        status = Path(f"/proc/{pid}/status")
        if not status.exists() or "\nState:\tZ" in status.read_text():
            return True
        time.sleep(0.01)
    return False


def test_a_name_that_two_packages_offer_runs_the_code_of_neither(fakes: Fakes) -> None:
    mark = fakes.folder / "ran"
    for distribution in ("one", "two"):
        fakes.platform("acme", distribution=distribution, probe=f"open({str(mark)!r}, 'w')")
    found = probe_platforms(fakes.entries(), os.environ)
    clashes = [report for report in found if report.name == "acme"]
    assert [report.probe for report in clashes] == ["broken", "broken"]
    assert "offered by one 1.2 and two 1.2" in clashes[0].reason
    assert not mark.exists()


def test_built_ins_are_probed_without_a_child_process(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", None)
    assert reports(fakes)["null"].probe == "usable"


def test_a_machine_without_processes_to_spare_is_reported(
    fakes: Fakes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise BlockingIOError("Resource temporarily unavailable")

    fakes.platform("acme")
    monkeypatch.setattr("subprocess.Popen", refuse)
    assert "no process could be started" in reports(fakes)["acme"].reason


def test_the_deadline_can_be_changed() -> None:
    assert probe_deadline({}) == 5.0
    assert probe_deadline({"DOVETAIL_PROBE_TIMEOUT": "0.5"}) == 0.5
    for wrong in ("soon", "0", "-1", "nan", "1e9"):
        with pytest.raises(ConfigError, match="DOVETAIL_PROBE_TIMEOUT"):
            probe_deadline({"DOVETAIL_PROBE_TIMEOUT": wrong})


def test_probing_what_is_really_installed_imports_no_framework() -> None:
    program = (
        "import os, sys\n"
        "from dovetail.core.plugins.selection import survey_platforms\n"
        "print([report.name for report in survey_platforms(os.environ)])\n"
        "sys.exit(sorted({'torch', 'jax', 'transformers'} & set(sys.modules)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'null'" in done.stdout
