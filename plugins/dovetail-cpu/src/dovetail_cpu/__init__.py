"""Dovetail on the CPU: x86, ARM and POWER, through torch."""

from __future__ import annotations

from importlib.util import find_spec

from dovetail.core.contracts.platform import Platform, PlatformPlugin, ProbeResult
from dovetail.core.machine import look_at_machine

__all__ = ["PLUGIN"]


def _probe() -> ProbeResult:
    if find_spec("torch") is None:
        return ProbeResult(usable=False, reason="torch is not installed: pip install torch")
    return ProbeResult(usable=True, reason=f"{look_at_machine().num_cores} cores", num_devices=1)


def _create() -> Platform:
    from dovetail_cpu.platform import CpuPlatform

    return CpuPlatform()


PLUGIN = PlatformPlugin(
    api_version=1,
    probe=_probe,
    create=_create,
    priority=10,
    # Threads that wait for each other sleep soon: spinning starves whoever shares the cores.
    environment={"GOMP_SPINCOUNT": "4000", "KMP_BLOCKTIME": "1"},
)
