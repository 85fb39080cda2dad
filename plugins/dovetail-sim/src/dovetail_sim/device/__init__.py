"""The emulated device: real torch tensors of device type ``sim``, computed by the host.

It knows nothing of Dovetail's contracts. What it does that a host never shows: memory that runs
out, copies that can be counted and that arrive late, and operations that are not there.
"""

from __future__ import annotations

from dovetail_sim.device.faults import Faults
from dovetail_sim.device.hardware import NAME, Counters, Hardware, Traffic
from dovetail_sim.device.install import hardware, missing

__all__ = ["NAME", "Counters", "Faults", "Hardware", "Traffic", "hardware", "missing"]
