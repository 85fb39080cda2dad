"""Dovetail on TPUs, through JAX; on a machine without one, simulated when it is asked for."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from dovetail.core.contracts.platform import Platform, PlatformPlugin, ProbeResult
from dovetail.core.errors import ConfigError

__all__ = ["PLUGIN", "SIMULATE", "num_simulated"]

SIMULATE = "DOVETAIL_TPU_SIMULATE"
"""Environment variable: how many devices JAX shall simulate on the CPU. It goes before hardware."""


def num_simulated(environ: Mapping[str, str] = os.environ) -> int | None:
    """Devices to simulate; None if simulation is not asked for. Raises ConfigError for nonsense."""
    value = environ.get(SIMULATE, "").strip()
    if not value:
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ConfigError(f"{SIMULATE}={value!r:.40} must be a number of devices, such as 8.")
    return int(value)


def _probe() -> ProbeResult:
    try:
        simulated = num_simulated()
    except ConfigError as error:
        return ProbeResult(usable=False, reason=str(error))
    if find_spec("jax") is None:
        return ProbeResult(usable=False, reason="jax is not installed: pip install 'jax[tpu]'")
    if simulated is not None:
        return ProbeResult(usable=True, reason=describe(simulated), num_devices=simulated)
    chips = [*Path("/dev").glob("accel[0-9]*"), *Path("/dev/vfio").glob("[0-9]*")]
    if not chips:
        reason = f"no TPU in /dev/accel* or /dev/vfio; to simulate one on the CPU, set {SIMULATE}=8"
        return ProbeResult(usable=False, reason=reason)
    if find_spec("libtpu") is None:
        return ProbeResult(usable=False, reason="libtpu is not installed: pip install 'jax[tpu]'")
    return ProbeResult(usable=True, reason=f"{len(chips)} TPU chips", num_devices=len(chips))


def describe(num_devices: int) -> str:
    """What is said wherever a simulated TPU is named."""
    return f"simulated on the CPU with {num_devices} device{'s' if num_devices > 1 else ''}"


def _environment() -> dict[str, str]:
    """What JAX must find before it starts. A wrong switch is left for the probe to report."""
    simulated = os.environ.get(SIMULATE, "").strip()
    if not simulated:
        return {"JAX_PLATFORMS": "tpu,cpu"}
    return {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": simulated}


def _create() -> Platform:
    from dovetail_tpu.platform import TpuPlatform

    return TpuPlatform(num_simulated())


PLUGIN = PlatformPlugin(
    api_version=1,
    probe=_probe,
    create=_create,
    priority=80,
    environment=_environment(),
)
