"""How torch's operations run on the simulated device: on the host, over the same memory."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from dovetail_sim.device.hardware import NAME, Hardware
from dovetail_sim.device.storage import CPU_KEYS, Storages

__all__ = ["Dispatcher"]

_KEY = "PrivateUse1"
_VIEWS = (
    "as_strided",
    "view",
    "_reshape_alias",
    "unfold",
    "view.dtype",
    "set_.source_Tensor",
    "set_.source_Storage",
    "set_.source_Storage_storage_offset",
)
"""Kernels of these look at sizes and strides only, so that the host's serve as they are."""
_FACTORIES = ("empty.memory_format", "empty_strided")
"""They have composite kernels, which would be taken before the fallback."""


class Dispatcher:
    """The kernels of the device type.

    Args:
        hardware: Memory, counters and faults.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._storages = Storages(hardware)

    def register(self) -> tuple[Any, ...]:
        """Enter them in torch's table; they are there as long as the libraries live."""
        everything, aten = _library("_"), _library("aten")
        everything.fallback(self.run, _KEY)
        for name in _VIEWS:
            aten.impl(name, _redispatched(_overload(name)), _KEY)
        for name in _FACTORIES:
            aten.impl(name, _bound(self.run, _overload(name)), _KEY)
        aten.impl("_copy_from", self.copy, _KEY)
        aten.impl("_local_scalar_dense", self.item, _KEY)
        return everything, aten

    def run(self, op: OpOverload, *args: Any, **kwargs: Any) -> Any:
        """Any operation: on the aliases, its results made memory of the device."""
        arrays = _tensors((args, kwargs))
        self._count(op, arrays)
        device = self._device_of(op, arrays, kwargs.get("device"))
        aliases: dict[int, tuple[Tensor, Tensor]] = {}

        def to_host(array: Tensor) -> Tensor:
            if array.device.type != NAME:
                return array
            alias = self._storages.alias(array)
            aliases[id(alias)] = (alias, array)
            return alias

        def to_device(array: Tensor) -> Tensor:
            known = aliases.get(id(array))
            return self._storages.adopt(array, device) if known is None else known[1]

        host_args, host_kwargs = _mapped((_with_numbers(op, args, arrays), kwargs), to_host)
        if "device" in host_kwargs:
            host_kwargs["device"] = torch.device("cpu")
        host_kwargs.pop("pin_memory", None)
        result = op(*host_args, **host_kwargs)
        for alias, array in list(aliases.values()):
            if alias.size() != array.size():  # an out= that was resized
                array.set_(self._storages.adopt(alias.clone(), device))  # type: ignore[call-overload]
        return _mapped(result, to_device)

    def _count(self, op: OpOverload, arrays: list[Tensor]) -> None:
        """Count the op and raise what is ordered for it."""
        name, counters = _name(op), self._hardware.counters
        counters.ops[name] += 1
        if arrays:
            shapes = tuple((tuple(array.shape), array.dtype) for array in arrays)
            counters.signatures.add((name, shapes))
        self._hardware.faults.before_op(name)

    def _device_of(self, op: OpOverload, arrays: list[Tensor], wanted: Any) -> int:
        """The index of the one device that is concerned. Raises RuntimeError if there are more."""
        devices = {array.device for array in arrays if _binding(array)}
        if len(devices) > 1 or any(device.type != NAME for device in devices):
            found = ", ".join(sorted(map(str, devices)))
            raise RuntimeError(f"{_name(op)}: arrays of several devices: {found}")
        if devices:
            return int(devices.pop().index)
        index = None if wanted is None else torch.device(wanted).index
        return self._hardware.current if index is None else index

    def copy(self, source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
        """Copy in any direction; to the host it may arrive late."""
        hardware, counters = self._hardware, self._hardware.counters
        num_bytes = source.numel() * source.element_size()
        if target.device.type != NAME:
            counters.to_host.add(num_bytes)
            hardware.send(self._storages.alias(source), target, late=non_blocking)
            return target
        if source.device.type != NAME:
            counters.to_device.add(num_bytes)
            self._storages.alias(target).copy_(source)
            return target
        if source.device == target.device:
            self._count(torch.ops.aten.copy_.default, [target, source])
        else:
            counters.between.add(num_bytes)
        self._storages.alias(target).copy_(self._storages.alias(source))
        return target

    def item(self, array: Tensor) -> Any:
        """One number, on the host: a copy, and a synchronisation."""
        self._hardware.synchronize()
        self._hardware.counters.to_host.add(array.element_size())
        return self._storages.alias(array).item()


def _library(namespace: str) -> Any:
    """Untyped in torch."""
    return torch.library.Library(namespace, "IMPL")  # type: ignore[no-untyped-call]


def _binding(array: Tensor) -> bool:
    """Whether an array says where to compute: numbers of the host go anywhere."""
    return array.device.type == NAME or array.dim() > 0


def _overload(name: str) -> OpOverload:
    base, _, overload = name.partition(".")
    found: OpOverload = getattr(getattr(torch.ops.aten, base), overload or "default")
    return found


def _redispatched(op: OpOverload) -> Callable[..., Any]:
    return lambda *args, **kwargs: op.redispatch(CPU_KEYS, *args, **kwargs)


def _bound(run: Callable[..., Any], op: OpOverload) -> Callable[..., Any]:
    return lambda *args, **kwargs: run(op, *args, **kwargs)


@cache
def _name(op: OpOverload) -> str:
    """Without the overload: structured operations arrive as their ``out`` one."""
    return str(op._schema.name).replace("::", ".")


def _with_numbers(op: OpOverload, args: tuple[Any, ...], arrays: list[Tensor]) -> tuple[Any, ...]:
    """Numbers as arrays again, where the op takes arrays.

    Torch gives kernels written in Python plain numbers, and has only some ops take them back.
    """
    places = [i for i in _strict_places(op) if i < len(args) and isinstance(args[i], int | float)]
    if not places:
        return args
    # What keeps both the precision of the number and the dtype of the result.
    wide = torch.float64 if any(a.is_floating_point() for a in arrays) else None
    changed = list(args)
    for i in places:
        dtype = wide if isinstance(args[i], float) else None
        changed[i] = torch.tensor(args[i], dtype=dtype)
    return tuple(changed)


@cache
def _strict_places(op: OpOverload) -> tuple[int, ...]:
    """Positions of arguments that must be arrays."""
    if torch._C._should_allow_numbers_as_tensors(op._schema.name.removeprefix("aten::")):
        return ()
    arguments = enumerate(op._schema.arguments)
    return tuple(i for i, argument in arguments if str(argument.type) == "Tensor")


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, tuple | list):
        return [array for item in value for array in _tensors(item)]
    return []


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The same nest of tuples, lists and dicts with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)([_mapped(item, change) for item in value])
    return value
