import json

import pytest

from dovetail.core.cli import main


@pytest.fixture(autouse=True)
def _no_device(monkeypatch):
    monkeypatch.delenv("DOVETAIL_DEVICE", raising=False)


def test_a_report(capsys):
    assert main(["conformance", "--device", "reference", "--level", "1"]) == 0
    said = capsys.readouterr()
    assert "Conformance of reference (dovetail " in said.out
    assert "11 passed, in" in said.out
    assert "Level 1, the contract: nothing is computed: passed" in said.out
    assert "Level 2" not in said.out
    assert "checking reference: 0 of 11 (contract.import)" in said.err


def test_some_checks(capsys):
    command = ["conformance", "--device", "reference", "--only", "ops.silu", "--only", "*.gelu.*16"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "5 passed" in said and "certifies nothing" in said


def test_json(capsys):
    assert main(["conformance", "--device", "null", "--level", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["platform"] == "null" and found["passed"]
    assert found["levels"] == {"1": True}
    assert {check["status"] for check in found["checks"]} == {"pass"}


def test_the_list(capsys):
    assert main(["conformance", "--device", "reference", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = [line.split()[1] for line in lines]
    assert {"contract.probe", "attention.sdpa.window.bfloat16", "tokens.llama"} <= set(names)


def test_shares_are_the_whole(capsys):
    def names(*more):
        assert main(["conformance", "--device", "null", "--level", "1", *more, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["complete"] == (not more)
        return [check["name"] for check in found["checks"]]

    whole = names()
    shares = [names("--share", f"{number}/3") for number in (1, 2, 3)]
    assert sorted(name for share in shares for name in share) == sorted(whole)
    assert {len(share) for share in shares} <= {len(whole) // 3, len(whole) // 3 + 1}


def test_nothing_passed_is_no_success(capsys):
    assert main(["conformance", "--device", "null", "--only", "ops"]) == 1
    said = capsys.readouterr().out
    assert " unsupported, in 0 s" in said and "passed" not in said


def test_failures(capsys, tmp_path):
    gaps = tmp_path / "gaps.txt"
    gaps.write_text("contract.devices: it has no name\n")
    command = ["conformance", "--device", "reference", "--level", "1", "--known-gaps", str(gaps)]
    assert main(command) == 1
    said = capsys.readouterr().out
    assert "1 failed" in said and "it has no name. Remove the line" in said
    assert "not passed" in said


def test_the_device_is_chosen_as_always(capsys, monkeypatch):
    monkeypatch.setenv("DOVETAIL_DEVICE", "null")
    assert main(["conformance", "--only", "contract.name"]) == 0
    assert "Conformance of null" in capsys.readouterr().out
    assert main(["conformance", "--device", "Reference", "--only", "contract.name"]) == 0
    assert "Conformance of reference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "said", "status"),
    [
        (["--device", "nobody"], "There is no platform 'nobody'", 1),
        (["--device", "null", "--only", "nothing"], "No check up to level 3", 1),
        (["--level", "4"], "--level", 2),
        (["--share", "3/2"], "'3/2' is no share: 2/8 is the second of eight", 2),
        (["--device", "null", "--level", "1", "--share", "99/99"], "11 such checks", 1),
        (["--device", "null", "--known-gaps", "/no/such/file"], "cannot be read", 1),
    ],
)
def test_mistakes(arguments, said, status, capsys):
    assert main(["conformance", *arguments]) == status
    assert said in capsys.readouterr().err
