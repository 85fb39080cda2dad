"""How many threads compute, as a process finds out that has just loaded torch."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from dovetail_cpu import platform

from dovetail.core.machine import look_at_machine
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core

PROGRAM = "from dovetail_cpu.platform import CpuPlatform; print(CpuPlatform().device_names()[0])"
VARIABLES = ("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY")


def num_threads(**variables: str) -> int:
    environ = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    text = subprocess.check_output(
        [sys.executable, "-c", PROGRAM], env=environ | variables, text=True
    )
    return int(text.split()[-2])


@pytest.mark.parametrize("variables", [{}, {"OMP_PROC_BIND": "close"}], ids=str)
def test_one_for_each_core(variables: dict[str, str]) -> None:
    """Also where OpenMP has bound the thread that asks to one of them."""
    assert num_threads(**variables) == look_at_machine({}).num_threads


def test_fewer_where_openmp_is_told() -> None:
    assert num_threads(OMP_NUM_THREADS="1") == 1


@pytest.mark.parametrize("num_nodes", [1, 2])
def test_several_nodes_are_warned_of(
    num_nodes: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    found = replace(look_at_machine(), num_nodes=num_nodes)
    monkeypatch.setattr(platform, "look_at_machine", lambda: found)
    platform._warn.cache_clear()
    checkpoint = make_checkpoint("llama", tmp_path)
    with caplog.at_level(logging.WARNING, logger=platform.__name__):
        for _ in range(2):
            answer(make_core(checkpoint, "cpu"), [[3, 4, 5]])
    records = [record for record in caplog.records if record.name == platform.__name__]
    warnings = [record.getMessage() for record in records]
    assert len(warnings) == num_nodes - 1
    assert all("2 NUMA nodes" in w and "numactl --cpunodebind=0" in w for w in warnings)
