"""The kit as a vendor runs it: ``pytest --pyargs dovetail.core.conformance --platform NAME``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


KIT = ("--pyargs", "dovetail.core.conformance", "--conformance-level", "1")


def test_several_platforms(tmp_path: Path) -> None:
    done = run(tmp_path, *KIT, "--platform", "null", "--platform", "reference")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("null", "reference"):
        assert f"test_check[{name}-contract.capabilities]" in done.stdout
    assert "24 passed" in done.stdout


def test_gaps_and_their_leftovers(tmp_path: Path) -> None:
    gaps = tmp_path / "gaps.txt"
    gaps.write_text("contract.name: it has two\nno.such.check: x\n")
    done = run(tmp_path, *KIT, "--platform", "null", "--known-gaps", str(gaps))
    assert done.returncode == 1
    assert "2 failed, 10 passed" in done.stdout
    assert "Remove the line" in done.stdout


def test_unsupported_checks_are_skipped_with_the_reason(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "--pyargs",
        "dovetail.core.conformance",
        "--platform",
        "null",
        "--conformance-level=2",
        "-k",
        "ops.silu",
    )
    assert done.returncode == 0
    assert "platform null has no ops to look at one by one" in done.stdout


def test_usage(tmp_path: Path) -> None:
    nobody = run(tmp_path, *KIT, "--platform", "nobody")
    assert nobody.returncode != 0 and "There is no platform 'nobody'" in nobody.stdout
    none = run(tmp_path, *KIT)
    assert none.returncode != 0 and "--platform NAME" in none.stdout


def test_other_runs_do_not_know_the_options(tmp_path: Path) -> None:
    (tmp_path / "test_x.py").write_text("def test_x(): pass\n")
    assert run(tmp_path, "test_x.py").returncode == 0
    refused = run(tmp_path, "test_x.py", "--platform", "null")
    assert refused.returncode == 4 and "unrecognized arguments" in refused.stderr
