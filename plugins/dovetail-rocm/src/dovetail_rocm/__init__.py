"""Dovetail on AMD GPUs, through torch's build for ROCm and Triton."""

from __future__ import annotations

from pathlib import Path

from dovetail.core.contracts.platform import Platform, PlatformPlugin, ProbeResult
from dovetail.platforms.gpu.build import torch_build
from dovetail.platforms.gpu.simulation import Simulation

__all__ = ["PLUGIN"]

_SIMULATION = Simulation("DOVETAIL_ROCM_SIMULATE")
_NODES = Path("/sys/class/kfd/kfd/topology/nodes")
_DEVICE = Path("/dev/kfd")


def _probe() -> ProbeResult:
    build = torch_build()
    if build is None:
        reason = "torch is not installed; AMD's build: https://pytorch.org/get-started"
        return ProbeResult(usable=False, reason=reason)
    if _SIMULATION.mentioned():
        return _SIMULATION.probe()
    if build.hip is None:
        reason = f"torch {build.version} is not built for ROCm: https://pytorch.org/get-started"
        return ProbeResult(usable=False, reason=reason)
    targets = gpu_targets(_NODES)
    if not targets:
        return ProbeResult(usable=False, reason=f"no AMD GPU in {_NODES}")
    if not _DEVICE.exists():
        reason = f"{_DEVICE} is not there: in a container, start it with --device {_DEVICE}"
        return ProbeResult(usable=False, reason=reason)
    reason = f"{', '.join(targets)}; ROCm {build.hip}"
    return ProbeResult(usable=True, reason=reason, num_devices=len(targets))


def gpu_targets(nodes: Path) -> list[str]:
    """The GPUs that the kernel's driver lists, by instruction set: ``gfx942``."""
    found = []
    for node in sorted(nodes.glob("*"), key=lambda path: path.name):
        text = _read(node / "properties")
        lines = (line.split() for line in text.splitlines())
        properties = {line[0]: line[1] for line in lines if len(line) == 2}
        number = int(properties.get("gfx_target_version", 0))
        if number:
            found.append(_target(number))
    return found


def _target(number: int) -> str:
    """``gfx90a`` for 90010: major, minor and stepping, two decimal digits each."""
    major, rest = divmod(number, 10_000)
    minor, stepping = divmod(rest, 100)
    return f"gfx{major}{minor:x}{stepping:x}"


def _read(file: Path) -> str:
    """Empty if it may not be read: nodes that belong to others are there, and closed."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""


def _create() -> Platform:
    from dovetail_rocm.platform import RocmPlatform

    return RocmPlatform(simulated=_SIMULATION.wanted())


PLUGIN = PlatformPlugin(
    api_version=1,
    probe=_probe,
    create=_create,
    priority=90,
    environment=_SIMULATION.environment(),
)
