"""A vendor outside the repository: nothing of it is in the tree, and nothing in the tree knows it.

Its sources lie beside this file and are installed into a folder of their own, as a user would with
pip. Then it is found, planned, certified and served like any platform.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.commands import dovetail, environment, install
from tests.servers import Server

ROOT = Path(__file__).parents[2]
SOURCES = Path(__file__).parent / "acme"
PROMPTS = ["def add(a, b):\n", "import os\n\n\ndef walk(", "class Queue:\n    "]
CHECKS = [
    "contract.*",
    "ops.rms_norm.*",
    "ops.silu_and_mul.*",
    "attention.acme-slots.*",
    "tokens.llama",
    "tokens.mistral",
]
SETTINGS = ("--dtype", "float32", "--max-model-len", "512")


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acme")
    install(SOURCES, folder)
    return folder


def test_the_tree_does_not_know_it(target: Path) -> None:
    known = [
        path
        for folder in ("src", "plugins")
        for path in (ROOT / folder).rglob("*.py")
        if "acme-slots" in path.read_text() or "dovetail_acme" in path.read_text()
    ]
    assert known == []
    assert find_spec("dovetail_acme") is None


def test_it_is_found(target: Path) -> None:
    found = json.loads(dovetail("platforms", "--json", "--device", "acme", folder=target).stdout)
    (report,) = (p for p in found["platforms"] if p["name"] == "acme")
    assert (report["probe"], report["reason"]) == ("usable", "one Acme card")
    assert (report["distribution"], report["version"]) == ("dovetail-acme", "3.1.4")


def test_doctor_starts_it_with_its_variables_and_its_backend(target: Path) -> None:
    command = ("doctor", "--json", "--device", "acme")
    done = dovetail(*command, folder=target, DOVETAIL_PLUGINS="dovetail-acme")
    assert done.returncode == 0, done.stdout
    start = json.loads(done.stdout)["start"]
    assert start["devices"] == ["Acme A1"]
    assert start["attention"][0] == "acme-slots"


def test_its_plan_shows_its_choices(target: Path) -> None:
    done = dovetail("plan", "--json", "--device", "acme", folder=target)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["memory"]["total"] == 1 << 30
    assert found["choices"]["attention"].startswith("acme-slots (first in the platform's order")
    assert "rms_norm" in json.dumps(found["choices"])
    few = found["settings"]["max_num_seqs"]
    assert few == {"value": 8, "reason": "the Acme A1 has eight lanes (platform acme)"}


def test_the_kit_certifies_it(target: Path) -> None:
    """What it has of its own, and whole models; the other checks are of shared code."""
    patterns = [f"--only={pattern}" for pattern in CHECKS]
    done = dovetail(
        "conformance", "--json", "--device", "acme", *patterns, folder=target, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    checks = json.loads(done.stdout)["checks"]
    passed = [check["name"] for check in checks if check["status"] == "pass"]
    for wanted in ("ops.rms_norm.", "attention.acme-slots.window.", "tokens.llama"):
        assert any(name.startswith(wanted) for name in passed), passed


def test_it_serves_the_tokens_of_the_reference_platform(target: Path, tmp_path: Path) -> None:
    mine = answers("acme", target, tmp_path / "acme.log")
    theirs = answers("reference", target, tmp_path / "reference.log")
    assert mine == theirs
    assert all(len(text) > 10 for text in mine)
    log = (tmp_path / "acme.log").read_text()
    assert "device acme (named by --device)" in log
    assert "acme-slots (first in the platform's order" in log


def answers(device: str, folder: Path, log: Path) -> list[str]:
    """What a real server says to all prompts at once."""
    server = Server(log, "--device", device, *SETTINGS, environ=environment(folder))
    try:
        return complete_all(server.url)
    finally:
        server.stop()


def complete_all(url: str) -> list[str]:
    body: dict[str, Any] = {"model": "dovetail-demo", "max_tokens": 24, "temperature": 0}
    reply = httpx.post(f"{url}/v1/completions", json=body | {"prompt": PROMPTS}, timeout=120)
    assert reply.status_code == 200, reply.text
    choices = sorted(reply.json()["choices"], key=lambda choice: choice["index"])
    return [choice["text"] for choice in choices]
