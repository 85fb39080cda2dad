"""What Triton compiles for here."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from dovetail.attention_backends.triton.tuning import Tuning

__all__ = ["Target", "absent", "present_target"]

_OLDEST = 80
"""The first compute capability, times ten, with bfloat16 in its matrix units."""
_INTERPRETED_PROCESSORS = 4


@dataclass(frozen=True)
class Target:
    """A GPU, or the host where kernels are interpreted."""

    architecture: str
    """As ``tuning.toml`` names it: ``sm_90``, ``gfx942``, ``interpreted``."""
    processors: int
    """Multiprocessors that run at once."""
    tuning: Tuning

    @classmethod
    def named(cls, architecture: str, processors: int) -> Target:
        """With what the table says of the architecture."""
        return cls(architecture, processors, Tuning.of(architecture))

    @property
    def interpreted(self) -> bool:
        """Kernels run in Triton's interpreter, which multiplies no bfloat16."""
        return self.architecture == "interpreted"


def absent(device: torch.device) -> str | None:
    """Why kernels cannot run on the device, in one line; None if they can."""
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if _interprets():
        if device.type == "cpu":
            return None
        return f"TRITON_INTERPRET is set, which is for the CPU, and the device is {device}"
    if device.type == "cpu":
        return "its kernels are for GPUs; on the CPU they run only with TRITON_INTERPRET=1, slowly"
    try:
        found = _compiles_for()
    except RuntimeError as error:
        return f"Triton finds no GPU: {str(error).splitlines()[0] if str(error) else error!r}"
    if found.startswith("sm_") and int(found[3:]) < _OLDEST:
        return f"the GPU is {found}; its kernels need sm_{_OLDEST} or later"
    return None


def present_target(device: torch.device) -> Target:
    """What kernels for the device are compiled for; ``absent`` must have said None."""
    if _interprets():
        return Target.named("interpreted", _INTERPRETED_PROCESSORS)
    return Target.named(_compiles_for(), _processors(device))


def _interprets() -> bool:
    """As Triton reads the variable."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


def _driver() -> Any:
    return import_module("triton.runtime").driver.active


def _compiles_for() -> str:
    """``sm_90``, ``gfx942``, or Triton's own name. Raises RuntimeError where there is no GPU."""
    target = _driver().get_current_target()
    return f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch)


def _processors(device: torch.device) -> int:
    driver = _driver()
    index = device.index if device.index is not None else driver.get_current_device()
    return int(driver.utils.get_device_properties(index)["multiprocessor_count"])
