"""What the probe says of drivers, builds of torch and switches. No GPU is needed."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from typing import Any

import dovetail_cuda
import pytest

from dovetail.core.contracts.platform import ProbeResult
from dovetail.platforms.gpu.build import TorchBuild

CUDA = TorchBuild(version="2.11.0+cu128", cuda="12.8", hip=None)
VARIABLE = "DOVETAIL_CUDA_SIMULATE"


class Driver:
    """The driver's library, as far as the probe calls it."""

    def __init__(
        self, gpus: Sequence[tuple[str, int, int]] = (), *, start: int = 0, ask: int = 0
    ) -> None:
        self.gpus, self.start, self.ask = gpus, start, ask

    def cuInit(self, flags: int) -> int:  # noqa: N802
        return self.start

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = len(self.gpus)
        return 0

    def cuDeviceGetName(self, name: Any, size: int, index: int) -> int:  # noqa: N802
        name.value = self.gpus[index][0].encode()
        return self.ask

    def cuDeviceGetAttribute(self, number: Any, attribute: int, index: int) -> int:  # noqa: N802
        number._obj.value = self.gpus[index][{75: 1, 76: 2}[attribute]]
        return 0

    def cuGetErrorString(self, code: int, text: Any) -> int:  # noqa: N802
        text._obj.value = b"system not yet initialized"
        return 0


def probe(
    monkeypatch: pytest.MonkeyPatch,
    driver: Driver | None = None,
    build: TorchBuild | None = CUDA,
) -> ProbeResult:
    def load(name: str) -> Any:
        assert name == "libcuda.so.1"
        if driver is None:
            raise OSError("cannot open shared object file")
        return driver

    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(dovetail_cuda, "torch_build", lambda: build)
    return dovetail_cuda.PLUGIN.probe()


def test_gpus_are_named_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    result = probe(monkeypatch, Driver([("NVIDIA H200", 9, 0), ("NVIDIA L4", 8, 9)]))
    assert result == ProbeResult(
        usable=True, reason="NVIDIA H200, NVIDIA L4; CUDA 12.8", num_devices=2
    )


@pytest.mark.parametrize(
    ("driver", "build", "words"),
    [
        (None, CUDA, "no NVIDIA driver"),
        (Driver(start=3), CUDA, r"does not start: system not yet initialized \(3\)"),
        (Driver(), CUDA, "shows no GPU"),
        (Driver([("NVIDIA H200", 9, 0)], ask=101), CUDA, "asking the NVIDIA driver failed"),
        (Driver([("Tesla P100", 6, 0)]), CUDA, "P100 has compute capability 6.0; the least is 7.5"),
        (None, None, "torch is not installed"),
        (None, TorchBuild(version="2.13.0+cpu", cuda=None, hip=None), r"2.13.0\+cpu is not built"),
    ],
)
def test_what_is_missing_is_said(
    driver: Driver | None,
    build: TorchBuild | None,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = probe(monkeypatch, driver, build)
    assert not result.usable
    assert re.search(words, result.reason), result.reason


def test_hidden_gpus_are_told_from_missing_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "CUDA_VISIBLE_DEVICES=''" in probe(monkeypatch, Driver()).reason


def test_simulation_is_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "1")
    result = dovetail_cuda.PLUGIN.probe()
    assert result.usable and "simulated on the CPU" in result.reason
    monkeypatch.setenv(VARIABLE, "yes")
    result = dovetail_cuda.PLUGIN.probe()
    assert not result.usable and f"{VARIABLE}='yes' must be 1 or 0" in result.reason
