"""What torch has a device do: copies to and from it, and ops by their shapes."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dovetail.core.contracts.workbench import Activity

__all__ = ["watch"]

_SCALAR = "aten._local_scalar_dense.default"
"""What reading a single number of a tensor comes down to."""


@contextmanager
def watch(device: torch.device) -> Iterator[Activity]:
    """Count what this thread does with a device. Slow: every op passes through Python.

    An op counts by its name and the shapes and dtypes of the tensors that it reads; ops that touch
    no tensor on the device do not count. On the host there are no copies.
    """
    activity = Activity()
    with _Watch(device.type, activity):
        yield activity


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, device: str, activity: Activity) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._device = device
        self._activity = activity

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        there = [tensor.device.type == self._device for tensor in inputs]
        self._count_copy(str(func), inputs, there, result)
        if any(there):
            self._activity.shapes.add(_signature(str(func), inputs))
        return result

    def _count_copy(
        self, name: str, inputs: list[torch.Tensor], there: list[bool], result: Any
    ) -> None:
        if self._device == "cpu":
            return
        if name == _SCALAR:
            self._activity.to_host += any(there)
        elif name.startswith("aten.copy_"):
            self._count(source=there[1], target=there[0])
        elif name.startswith("aten._to_copy"):
            self._count(source=there[0], target=result.device.type == self._device)

    def _count(self, *, source: bool, target: bool) -> None:
        self._activity.to_device += target and not source
        self._activity.to_host += source and not target


def _signature(name: str, inputs: list[torch.Tensor]) -> Hashable:
    return name, tuple((tuple(tensor.shape), str(tensor.dtype)) for tensor in inputs)
