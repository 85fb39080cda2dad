"""Threads that repeat a recorded step together, while others take the cores from them."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_kernels import threads
from cpu_kernels.engines import Machine, Row, make_cpu_core
from dovetail_cpu.kernels import Kernels

from tests.checkpoints import make_checkpoint

SECONDS = 3.0
LEAST, MOST = 100, 5000
STEPS = (
    [Row([7], 3, [1]), Row([9], 40, [2, 3, 4])],
    [Row([8, 9, 10, 11, 12], 30, [5, 6, 7])],
    [Row([5], 250, list(range(8, 24)))],
)


@contextmanager
def busy_cores(count: int) -> Iterator[None]:
    """Other processes that never rest."""
    burn = [sys.executable, "-c", "while True: pass"]
    others = [subprocess.Popen(burn) for _ in range(count)]
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.wait()


@pytest.mark.parametrize("num", [2, 5])
def test_bits_are_the_same_however_threads_are_held_up(
    num: int, kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = make_checkpoint("llama", tmp_path, dtype="bfloat16")
    core = make_cpu_core(path, kernels, monkeypatch)
    runner: Any = core.runner
    model = runner._loaded.model
    recorded, plain = Machine(model, core), Machine(model._model, core)
    want = [plain.step(rows) for rows in STEPS for _ in range(2)][1::2]
    with threads(num), busy_cores(2):
        done, end = 0, time.monotonic() + SECONDS
        while done < MOST and (done < LEAST or time.monotonic() < end):
            for rows, hidden in zip(STEPS, want, strict=True):
                assert torch.equal(recorded.step(rows), hidden)
            done += len(STEPS)
    assert {2, 5, 1} <= set(model._records)
