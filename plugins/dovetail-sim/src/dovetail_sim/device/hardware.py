"""The state of the simulated devices: memory, counters, and copies that have not arrived."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dovetail.core.errors import ConfigError
from dovetail_sim.device.faults import Faults

__all__ = ["NAME", "Counters", "Hardware", "Traffic"]

NAME = "sim"
"""The device type, as ``torch.device`` has it."""


@dataclass
class Traffic:
    """Copies in one direction."""

    copies: int = 0
    num_bytes: int = 0

    def add(self, num_bytes: int) -> None:
        """Count one copy."""
        self.copies += 1
        self.num_bytes += num_bytes


@dataclass
class Counters:
    """What the devices did. Views are free; everything else is an op, a copy, or both."""

    ops: Counter[str] = field(default_factory=Counter)
    """By name without overload: ``aten.mm``."""
    signatures: set[Hashable] = field(default_factory=set)
    """(op, (shape, dtype) of each array): what a compiler of static shapes would have compiled."""
    to_device: Traffic = field(default_factory=Traffic)
    to_host: Traffic = field(default_factory=Traffic)
    between: Traffic = field(default_factory=Traffic)
    """From one simulated device to another."""


@dataclass
class DeviceMemory:
    """Bytes of one device."""

    used: int = 0
    peak: int = 0


class Hardware:
    """All simulated devices of this process.

    Args:
        num_devices: ``sim:0``, ``sim:1``, ...
        limit: Bytes of memory that each has.
        faults: Failures that are ordered.
    """

    def __init__(self, *, num_devices: int = 1, limit: int = 1 << 30, faults: Faults) -> None:
        self.num_devices = num_devices
        self.limit = limit
        self.faults = faults
        self.counters = Counters()
        self.memory = [DeviceMemory() for _ in range(num_devices)]
        self.current = 0
        """The device that is meant where none is named."""
        self._arriving: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Hardware:
        """As the variables ``DOVETAIL_SIM_*`` say. Raises ConfigError for what makes no sense."""
        return cls(
            num_devices=_positive(environ, "DOVETAIL_SIM_DEVICES", 1),
            limit=_positive(environ, "DOVETAIL_SIM_MEMORY", 1 << 30),
            faults=Faults.from_environ(environ),
        )

    def take(self, device: int, num_bytes: int) -> None:
        """Take memory. Raises torch.OutOfMemoryError if there is too little, or if ordered to."""
        if not 0 <= device < self.num_devices:
            raise RuntimeError(f"there is no {NAME}:{device}; there are {self.num_devices} devices")
        self.faults.before_allocation(num_bytes)
        memory = self.memory[device]
        if memory.used + num_bytes > self.limit:
            raise torch.OutOfMemoryError(
                f"{NAME}:{device} is out of memory: {num_bytes:,} bytes were asked for,"
                f" {self.limit - memory.used:,} of {self.limit:,} are free"
            )
        memory.used += num_bytes
        memory.peak = max(memory.peak, memory.used)

    def give(self, device: int, num_bytes: int) -> None:
        """Give memory back."""
        self.memory[device].used -= num_bytes

    def send(self, source: Tensor, target: Tensor, *, late: bool) -> None:
        """Copy device memory, seen by its host alias, to the host.

        A late copy shows poison until the next ``synchronize``: NaN, or a pattern of bits.
        """
        if not late:
            self.synchronize()
            target.copy_(source)
            return
        self._arriving.append((target, source.clone()))
        target.fill_(_poison(target.dtype))

    def synchronize(self) -> None:
        """Wait until all copies have arrived."""
        with torch.inference_mode():  # a device writes to any memory that it was given
            for target, value in self._arriving:
                target.copy_(value)
        self._arriving.clear()


def _poison(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point or dtype.is_complex:
        return float("nan")
    if dtype == torch.bool:
        return True
    return int.from_bytes(b"\xa5" * dtype.itemsize, "little", signed=dtype.is_signed)


def _positive(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name, str(default))
    if not text.isdigit() or not int(text):
        raise ConfigError(f"{name}={text!r}: must be a positive whole number")
    return int(text)
