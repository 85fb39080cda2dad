"""Failures that are ordered, to see that whoever uses the device bears them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from dovetail.core.errors import ConfigError

__all__ = ["VARIABLE", "Faults"]

VARIABLE = "DOVETAIL_SIM_FAULTS"
_SYNTAX = "unsupported=OP[,OP...], op=N, allocation=N, separated by semicolons"


class Faults:
    """What fails, and when. Op names have no overload: ``aten.silu``, also for an ``out=``.

    ``DOVETAIL_SIM_FAULTS`` orders failures from the start: ``unsupported=aten.topk,aten.sort``;
    ``op=120`` fails the 120th op and ``allocation=40`` the 40th allocation. Several are separated
    by semicolons.
    """

    def __init__(self) -> None:
        self.unsupported: set[str] = set()
        """Ops that raise NotImplementedError, each time."""
        self._ops = _Countdown()
        self._allocations = _Countdown()

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> Faults:
        """Those that the variable orders. Raises ConfigError for what it cannot read."""
        faults = cls()
        for rule in filter(None, environ.get(VARIABLE, "").split(";")):
            name, _, value = (part.strip() for part in rule.partition("="))
            if name == "unsupported":
                faults.unsupported |= {op.strip() for op in value.split(",")}
            elif name in ("op", "allocation") and value.isdigit() and int(value):
                fail = faults.fail_op if name == "op" else faults.fail_allocation
                fail(int(value))
            else:
                raise ConfigError(f"{VARIABLE}: {rule!r} is none of {_SYNTAX}")
        return faults

    def fail_op(self, number: int = 1, times: int = 1) -> None:
        """Let the op ``number`` from now on, and so many in a row, raise RuntimeError."""
        self._ops = _Countdown(number, times)

    def fail_allocation(self, number: int = 1, times: int = 1) -> None:
        """The same for allocations, which raise torch.OutOfMemoryError."""
        self._allocations = _Countdown(number, times)

    def clear(self) -> None:
        """Order nothing any more."""
        self.unsupported.clear()
        self._ops = self._allocations = _Countdown()

    def before_op(self, name: str) -> None:
        """Raise if this op is to fail."""
        if name in self.unsupported:
            raise NotImplementedError(f"{name} is not supported on the simulated device")
        if self._ops.due():
            raise RuntimeError(f"{name} failed on the simulated device, as was ordered")

    def before_allocation(self, num_bytes: int) -> None:
        """Raise if this allocation is to fail."""
        if self._allocations.due():
            raise torch.OutOfMemoryError(
                f"{num_bytes} bytes were refused on the simulated device, as was ordered"
            )


class _Countdown:
    """Due at the event ``number`` from now on, ``times`` in a row."""

    def __init__(self, number: int = 0, times: int = 0) -> None:
        self._before = number - 1
        self._times = times

    def due(self) -> bool:
        """Count an event."""
        if not self._times:
            return False
        if self._before:
            self._before -= 1
            return False
        self._times -= 1
        return True
