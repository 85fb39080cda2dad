"""Entering the simulated device in torch's one slot for devices of others."""

from __future__ import annotations

import types
from functools import cache
from typing import Any

import torch
from torch.utils import backend_registration

from dovetail.core.errors import UnsupportedError
from dovetail_sim.device.dispatch import Dispatcher
from dovetail_sim.device.hardware import NAME, Hardware

__all__ = ["hardware", "missing"]

_SETUP = "_setup_privateuseone_for_python_backend"
_kept: list[Any] = []
"""Torch forgets kernels when their library is collected."""


def missing() -> str | None:
    """Why this torch cannot have the device; None if it can."""
    if not hasattr(backend_registration, _SETUP):
        return f"torch {torch.__version__} takes no devices written in Python; 2.12 and later do"
    taken = torch._C._get_privateuse1_backend_name()
    if taken not in ("privateuseone", NAME):
        return f"torch's one place for devices of others is taken by {taken} in this process"
    return None


@cache
def hardware() -> Hardware:
    """The devices of this process; the first call makes them, as the environment says.

    From then on torch computes on one thread of the host: models made to develop with are so small
    that sharing them out costs several times what it saves, most of all beside other work.

    Raises:
        UnsupportedError: This torch cannot have them, or another package has taken the place.
        ConfigError: A variable makes no sense.
    """
    reason = missing()
    if reason is not None:
        raise UnsupportedError(f"the simulated device cannot be used: {reason}")
    made = Hardware.from_environ()
    torch.set_num_threads(1)
    getattr(backend_registration, _SETUP)(NAME, backend_module=_Module(made))
    _kept.extend(Dispatcher(made).register())
    return made


class _Module(types.ModuleType):
    """``torch.sim``: what torch asks of the module of a device type."""

    def __init__(self, made: Hardware) -> None:
        super().__init__(f"torch.{NAME}")
        self._made = made

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return self._made.num_devices

    def current_device(self) -> int:
        return self._made.current

    def set_device(self, device: Any) -> None:
        index = device if isinstance(device, int) else torch.device(device).index
        self._made.current = index or 0

    def manual_seed_all(self, seed: int) -> None:
        """No generator lives on the device."""

    def synchronize(self, device: Any = None) -> None:
        self._made.synchronize()

    def empty_cache(self) -> None:
        """Nothing is kept that nobody uses."""

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        index = device if isinstance(device, int) else torch.device(device or NAME).index
        used = self._made.memory[self._made.current if index is None else index].used
        return self._made.limit - used, self._made.limit
