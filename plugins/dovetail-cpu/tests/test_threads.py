"""How many threads compute, as a process finds out that has just loaded torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dovetail.core.machine import look_at_machine

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
