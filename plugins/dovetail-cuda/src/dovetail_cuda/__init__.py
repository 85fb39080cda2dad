"""Dovetail on NVIDIA GPUs, through torch and Triton."""

from __future__ import annotations

import ctypes
import os
from dataclasses import dataclass

from dovetail.core.contracts.platform import Platform, PlatformPlugin, ProbeResult
from dovetail.platforms.gpu.build import torch_build
from dovetail.platforms.gpu.simulation import Simulation

__all__ = ["PLUGIN"]

_SIMULATION = Simulation("DOVETAIL_CUDA_SIMULATE")
_LEAST = (7, 5)
"""The oldest compute capability that today's Triton compiles for."""


def _probe() -> ProbeResult:
    build = torch_build()
    if build is None:
        return ProbeResult(usable=False, reason="torch is not installed: pip install torch")
    if _SIMULATION.mentioned():
        return _SIMULATION.probe()
    if build.cuda is None:
        reason = f"torch {build.version} is not built for CUDA: pip install torch from PyPI has it"
        return ProbeResult(usable=False, reason=reason)
    try:
        gpus = _gpus()
    except OSError as error:
        return ProbeResult(usable=False, reason=str(error))
    old = [gpu for gpu in gpus if gpu.capability < _LEAST]
    if old:
        major, minor = old[0].capability
        least = ".".join(map(str, _LEAST))
        reason = f"{old[0].name} has compute capability {major}.{minor}; the least is {least}"
        return ProbeResult(usable=False, reason=reason)
    names = ", ".join(gpu.name for gpu in gpus)
    return ProbeResult(usable=True, reason=f"{names}; CUDA {build.cuda}", num_devices=len(gpus))


@dataclass(frozen=True)
class _Gpu:
    name: str
    capability: tuple[int, int]


def _gpus() -> list[_Gpu]:
    """What the driver shows to this process. Raises OSError with the reason if it shows none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise OSError("no NVIDIA driver (libcuda.so.1 is not there)") from error
    code = driver.cuInit(0)
    if code:
        raise OSError(f"the NVIDIA driver does not start: {_message(driver, code)}")
    count = ctypes.c_int()
    _check(driver, driver.cuDeviceGetCount(ctypes.byref(count)))
    if not count.value:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        hidden = f" (CUDA_VISIBLE_DEVICES={visible!r:.40})" if visible is not None else ""
        raise OSError(f"the NVIDIA driver shows no GPU{hidden}")
    return [_gpu(driver, index) for index in range(count.value)]


_MAJOR, _MINOR = 75, 76
"""Numbers of two attributes in the driver's interface."""


def _gpu(driver: ctypes.CDLL, index: int) -> _Gpu:
    name = ctypes.create_string_buffer(96)
    _check(driver, driver.cuDeviceGetName(name, len(name), index))
    numbers = []
    for attribute in (_MAJOR, _MINOR):
        number = ctypes.c_int()
        _check(driver, driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, index))
        numbers.append(number.value)
    return _Gpu(name.value.decode(errors="replace"), (numbers[0], numbers[1]))


def _check(driver: ctypes.CDLL, code: int) -> None:
    if code:
        raise OSError(f"asking the NVIDIA driver failed: {_message(driver, code)}")


def _message(driver: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    driver.cuGetErrorString(code, ctypes.byref(text))
    return (text.value or b"unknown error").decode(errors="replace") + f" ({code})"


def _create() -> Platform:
    from dovetail_cuda.platform import CudaPlatform

    return CudaPlatform(simulated=_SIMULATION.wanted())


PLUGIN = PlatformPlugin(
    api_version=1,
    probe=_probe,
    create=_create,
    priority=100,
    environment=_SIMULATION.environment(),
)
