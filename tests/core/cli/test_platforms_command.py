import json

import pytest

from dovetail.core.cli import main
from dovetail.core.plugins import selection
from dovetail.core.plugins.examine import PlatformReport


def report(name, priority, probe="usable"):
    return PlatformReport(
        name=name,
        distribution=f"dovetail-{name}",
        version="1.0",
        priority=priority,
        probe=probe,
        reason="as the test says",
        num_devices=1,
    )


@pytest.fixture
def installed(monkeypatch):
    def install(*reports):
        monkeypatch.setattr(selection, "survey_platforms", lambda environ: reports)
        monkeypatch.delenv("DOVETAIL_DEVICE", raising=False)

    return install


def test_table(installed, capsys):
    installed(report("slow", 1), report("quick", 2), report("gone", 3, "absent"))
    assert main(["platforms"]) == 0
    shown = capsys.readouterr().out
    assert "Chosen: quick" in shown
    assert "gone" in shown


def test_json(installed, capsys):
    installed(report("slow", 1), report("quick", 2))
    assert main(["platforms", "--json", "--device", "slow"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["selected"], len(found["platforms"])) == ("slow", 2)


def test_nothing_usable(installed, capsys):
    installed(report("gone", 3, "absent"))
    assert main(["platforms"]) == 1
    assert "Chosen: none" in capsys.readouterr().out
