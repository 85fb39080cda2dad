"""Device memory: the host's, handed to torch through DLPack as that of another device.

Torch takes memory of a foreign device type from a DLPack capsule and gives it the device type
``PrivateUse1``. The host's tensor over the same memory, its alias, is what ops are computed on.
"""

from __future__ import annotations

import ctypes
import weakref
from typing import Any

import torch
from torch import Tensor

from dovetail_sim.device.hardware import Hardware

__all__ = ["CPU_KEYS", "Storages"]

CPU_KEYS = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
"""Where the kernels are that look at nothing but sizes and strides."""
_EXTENSION_DEVICE = 12
"""kDLExtDev of the DLPack specification."""
_DLPACK_TYPES = {
    torch.int8: (0, 8),
    torch.int16: (0, 16),
    torch.int32: (0, 32),
    torch.int64: (0, 64),
    torch.uint8: (1, 8),
    torch.uint16: (1, 16),
    torch.uint32: (1, 32),
    torch.uint64: (1, 64),
    torch.float16: (2, 16),
    torch.float32: (2, 32),
    torch.float64: (2, 64),
    torch.bfloat16: (4, 16),
    torch.complex64: (5, 64),
    torch.bool: (6, 8),
    torch.float8_e4m3fn: (10, 8),
    torch.float8_e5m2: (12, 8),
}
"""(code, bits) of the DLPack specification."""


class _Tensor(ctypes.Structure):
    """DLTensor of the DLPack specification."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor. There is no deleter: one written in Python may run while C++ unwinds."""

    _fields_ = (("tensor", _Tensor), ("context", ctypes.c_void_p), ("deleter", ctypes.c_void_p))


_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


class Storages:
    """The memory of all devices.

    Args:
        hardware: Told of what is taken and given back.
    """

    def __init__(self, hardware: Hardware) -> None:
        self._hardware = hardware
        self._aliases: dict[tuple[int, int], torch.UntypedStorage] = {}
        """The host's storage by device and address."""
        self._held: dict[int, Any] = {}
        """What must live as long as the device's storage, by the managed tensor's address."""

    def adopt(self, array: Tensor, device: int) -> Tensor:
        """Make a host tensor's whole storage memory of the device, and a tensor of its shape.

        The host tensor is not to be used any more. Raises torch.OutOfMemoryError.
        """
        storage = array.untyped_storage()
        num_bytes = storage.nbytes()
        known = self._aliases.get((device, storage.data_ptr()))
        # One that torch has resized on the host has left its memory, which may be another's now.
        if num_bytes and known is not None and known.data_ptr() == storage.data_ptr():
            raise RuntimeError("this memory belongs to the simulated device already")
        self._hardware.take(device, num_bytes)
        if not num_bytes:
            storage = torch.empty(1, dtype=torch.uint8).untyped_storage()
        flat = self._flat(storage, num_bytes, array.dtype, device)
        shaped: Tensor = torch.ops.aten.as_strided.default.redispatch(
            CPU_KEYS, flat, array.size(), array.stride(), array.storage_offset()
        )
        return shaped

    def _flat(
        self, storage: torch.UntypedStorage, num_bytes: int, dtype: torch.dtype, device: int
    ) -> Tensor:
        code, bits = _DLPACK_TYPES[dtype]
        shape = (ctypes.c_int64 * 1)(num_bytes // dtype.itemsize)
        address = storage.data_ptr()
        managed = _Managed(
            _Tensor(address, _EXTENSION_DEVICE, device, 1, code, bits, 1, shape, None, 0),
            None,
            None,
        )
        key = ctypes.addressof(managed)
        self._held[key] = (managed, shape, storage)
        self._aliases[device, address] = storage
        flat: Tensor = torch._C._from_dlpack(_new_capsule(key, b"dltensor", None))
        weakref.finalize(flat.untyped_storage(), self._free, key, device, address, num_bytes)
        return flat

    def _free(self, key: int, device: int, address: int, num_bytes: int) -> None:
        self._hardware.give(device, num_bytes)
        *_, storage = self._held.pop(key)
        if self._aliases.get((device, address)) is storage:
            del self._aliases[device, address]

    def alias(self, array: Tensor) -> Tensor:
        """The host's tensor over the same memory as a tensor of the device."""
        storage = self._aliases[array.device.index, array.untyped_storage().data_ptr()]
        return torch.empty(0, dtype=array.dtype).set_(
            storage, array.storage_offset(), array.size(), array.stride()
        )
