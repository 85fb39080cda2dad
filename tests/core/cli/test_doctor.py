"""``dovetail doctor`` as users type it. What it says of broken plug-ins: ``test_hostile.py``."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.commands import dovetail, environment

ALONE = {"DOVETAIL_PLUGINS": ""}
"""Where plug-ins do not matter, none is looked at."""


@pytest.fixture(scope="module")
def healthy() -> dict[str, Any]:
    done = dovetail("doctor", "--json", "--device", "reference")
    assert done.returncode == 0, done.stdout
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_a_healthy_installation(healthy: dict[str, Any]) -> None:
    assert healthy["findings"] == []
    assert (healthy["selected"], healthy["reason"]) == ("reference", "named by --device")
    assert {"dovetail", "numpy", "torch", "tokenizers"} <= set(healthy["packages"])
    assert healthy["machine"]["num_cores"] >= 1
    assert 0 < healthy["machine"]["memory_free"] <= healthy["machine"]["memory_total"]
    assert healthy["start"]["attention"][:2] == ["reference", "sdpa"]
    assert {entry["state"] for entry in healthy["entries"]} == {"fine"}
    groups = {entry["group"] for entry in healthy["entries"]}
    assert {"dovetail.attention_backends", "dovetail.models", "dovetail.quant"} <= groups
    assert all(healthy["folders"][folder] == "" for folder in healthy["folders"])


def test_the_same_for_people() -> None:
    done = dovetail("doctor", "--device", "null", OMP_NUM_THREADS="3")
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[0].startswith("dovetail:  0.")
    assert any(line.startswith("threads:") and "OMP_NUM_THREADS=3" in line for line in lines)
    assert "Chosen: null, named by --device" in lines
    assert "+  invariant, reference, sdpa, triton  dovetail 0.1.0" in lines
    assert lines[-1] == "No problem was found."


def test_its_own_process_imports_no_framework_and_its_children_work_at_once() -> None:
    program = (
        "import sys\n"
        "from dovetail.core.cli import main\n"
        "status = main(['doctor', '--device', 'null', '--json'])\n"
        "print(sorted({'torch', 'jax', 'transformers'} & set(sys.modules)), status)\n"
    )
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[] 0"
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("variables", "findings", "status"),
    [
        (
            {"DOVETAIL_DEVCE": "cpu", "HF_HUB_CACHE": "/dev/null/hub"},
            ["DOVETAIL_DEVCE is unknown; did you mean 'DOVETAIL_DEVICE'?", "hub cannot be written"],
            0,
        ),
        ({"DOVETAIL_PLUGINS": "acme"}, ["DOVETAIL_PLUGINS names 'acme', which no installed"], 1),
        (
            {"DOVETAIL_PROBE_TIMEOUT": "soon", "DOVETAIL_ALLOW_LONG_MAX_MODEL_LEN": "maybe"},
            ["DOVETAIL_PROBE_TIMEOUT must be a number", "must be true or false"],
            1,
        ),
        ({"DOVETAIL_DEVICE": "acme"}, ["be chosen: There is no platform 'acme'"], 1),
    ],
    ids=lambda value: str(value)[:30],
)
def test_what_is_wrong_with_the_environment(
    variables: dict[str, str], findings: list[str], status: int
) -> None:
    device = () if "DOVETAIL_DEVICE" in variables else ("--device", "null")
    done = dovetail("doctor", *device, **(ALONE | variables))
    assert done.returncode == status, done.stdout
    for finding in findings:
        assert finding in done.stdout


def test_a_key_is_not_shown() -> None:
    done = dovetail("doctor", "--device", "null", DOVETAIL_API_KEY="sk-secret", **ALONE)
    assert "DOVETAIL_API_KEY=(hidden)" in done.stdout
    assert "sk-secret" not in done.stdout


def test_what_is_kept_out_is_said(tmp_path: Path) -> None:
    done = dovetail("doctor", DOVETAIL_PLUGINS="")
    assert done.returncode == 1, "without plug-ins, nothing is chosen by itself"
    assert "Kept out: cpu (dovetail-cpu 0.1.0); DOVETAIL_PLUGINS does not name it" in done.stdout
