"""The compiled kernels: which of them this processor has, and how they are called.

They take addresses and sizes, know nothing of torch but its threads, and are compiled when the
package is installed (``hatch_build.py``).
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
from collections.abc import Iterator
from ctypes import c_bool, c_float, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dovetail.core.errors import PluginError

__all__ = [
    "Function",
    "HeadsStruct",
    "Int4Struct",
    "Int8Struct",
    "Kernels",
    "LayerStruct",
    "QuantizedStruct",
    "StepStruct",
    "Tape",
    "TargetStruct",
    "load_kernels",
    "why_absent",
]

LIBRARY = Path(__file__).with_name("libkernels.so")
VARIABLE = "DOVETAIL_CPU_KERNELS"
"""Environment: an instruction set to use instead of the best, or ``off``."""
INSTRUCTION_SETS = ("amx", "avx512_bf16", "avx512", "avx2", "generic")
"""Best first. A processor that has one of x86 has those behind it."""


class LayerStruct(ctypes.Structure):
    """``Layer`` in native/attention.h."""

    _fields_ = [
        ("num_heads", c_int64),
        ("num_kv_heads", c_int64),
        ("head_size", c_int64),
        ("block_size", c_int64),
        ("window", c_int64),
        ("slopes", c_void_p),
        ("cache", c_void_p),
        ("scales", c_void_p),
        ("format", c_int64),
        ("scale", c_float),
        ("soft_cap", c_float),
    ]


class StepStruct(ctypes.Structure):
    """``Step`` in native/attention.h."""

    _fields_ = [
        ("num_tokens", c_int64),
        ("num_tasks", c_int64),
        ("num_merges", c_int64),
        ("table_width", c_int64),
        ("query_starts", c_void_p),
        ("context_lens", c_void_p),
        ("tables", c_void_p),
        ("slots", c_void_p),
        ("tasks", c_void_p),
        ("merges", c_void_p),
        ("parts", c_void_p),
    ]


class HeadsStruct(ctypes.Structure):
    """``Heads`` in native/attention.h."""

    _fields_ = [
        ("q", c_void_p),
        ("k", c_void_p),
        ("v", c_void_p),
        ("q_stride", c_int64),
        ("k_stride", c_int64),
        ("v_stride", c_int64),
        ("cosines", c_void_p),
        ("sines", c_void_p),
        ("half", c_int64),
        ("q_norm", c_void_p),
        ("k_norm", c_void_p),
        ("wide_norms", c_int64),
        ("eps", c_float),
    ]


class QuantizedStruct(ctypes.Structure):
    """``Quantized`` in native/integers.h."""

    _fields_ = [("codes", c_void_p), ("steps", c_void_p), ("group_sums", c_void_p)]


class Int8Struct(ctypes.Structure):
    """``Int8Weight`` in native/integers.h."""

    _fields_ = [
        ("panels", c_void_p),
        ("scales", c_void_p),
        ("offsets", c_void_p),
        ("num_inputs", c_int64),
    ]


class Int4Struct(ctypes.Structure):
    """``Int4Weight`` in native/integers.h."""

    _fields_ = [("panels", c_void_p), ("scales", c_void_p), ("num_inputs", c_int64)]


class TargetStruct(ctypes.Structure):
    """``Target`` in native/linear.h."""

    _fields_ = [
        ("out", c_void_p),
        ("wide", c_bool),
        ("stride", c_int64),
        ("num_columns", c_int64),
        ("bias", c_void_p),
        ("gate", c_int64),
    ]


_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[-.][^/]*$")
_P, _N = c_void_p, c_int64
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "pack": (_P, _P, _N, _N, _P, _P),
    "bf16_linear": (_P, _N, _N, _N, _P, _N, _P, _N, _P, _N),
    "quantize": (_P, _N, _N, _N, _N, _P, _P, _P),
    "int8_linear": (_P, _N, _P, _P),
    "int4_linear": (_P, _N, _P, _P),
    "rms_norm": (_P, _P, _N, _N, _P, _N, c_float, _P, _P),
    "gate": (_P, _N, _N, _N, _P),
    "layer_norm": (_P, _N, _N, _P, _P, _N, c_float, _P),
    "add": (_P, _P, _N, _P),
    "pointwise": (_P, _N, _N, c_float, _P),
    "attend": (_P, _P, _P, _P),
    "embedding": (_P, _N, _P, _N, _N, _P),
    "choose": (_P, _N, _N, _N, _N, _P, _P, _P),
    "replay": (_P, _N),
}
_REPLAYED = (
    "bf16_linear",
    "quantize",
    "int8_linear",
    "rms_norm",
    "gate",
    "attend",
    "embedding",
    "int4_linear",
    "layer_norm",
    "add",
    "pointwise",
)
"""In the order of their numbers in ``replay`` (native/kernels.cpp), from 1."""
_MOST_ARGUMENTS = 12


class Tape:
    """Calls of kernels, noted while a thread records: its own calls, and no other thread's."""

    def __init__(self) -> None:
        self.owner: int | None = None
        """The thread that records."""
        self._lock = threading.Lock()
        self._kept: list[object] = []
        self._calls: list[list[int]] = []

    def begin(self) -> bool:
        """Record this thread's calls until ``end``; False: another thread is recording."""
        if not self._lock.acquire(blocking=False):
            return False
        self.owner = threading.get_ident()
        return True

    def end(self) -> tuple[NDArray[np.int64], list[object]]:
        """The calls (n, 13) as ``replay`` reads them, and what they point to and was kept."""
        calls, kept = np.array(self._calls, np.int64).reshape(-1, _MOST_ARGUMENTS + 1), self._kept
        self._calls, self._kept, self.owner = [], [], None
        self._lock.release()
        return calls, kept

    def is_mine(self) -> bool:
        """Whether this thread records."""
        return self.owner is not None and self.owner == threading.get_ident()

    def note(self, number: int, arguments: tuple[Any, ...]) -> None:
        """Another call."""
        row = [number, *(_as_integer(a) for a in arguments)]
        self._calls.append(row + [0] * (_MOST_ARGUMENTS + 1 - len(row)))

    def keep(self, held: object) -> None:
        """Hold something for as long as the calls are, if this thread records."""
        if self.is_mine():
            self._kept.append(held)


def _as_integer(argument: Any) -> int:
    if isinstance(argument, float):
        return int(np.float32(argument).view(np.int32))
    return int(argument or 0)


class Function:
    """One kernel."""

    __slots__ = ("_function", "_number", "_tape")

    def __init__(self, function: Any, number: int, tape: Tape) -> None:
        self._function = function
        self._number = number
        self._tape = tape

    def __call__(self, *arguments: Any) -> None:
        """Addresses are integers; None is no address."""
        if self._number and self._tape.is_mine():
            self._tape.note(self._number, arguments)
        self._function(*arguments)


@dataclass(frozen=True)
class Kernels:
    """The functions of native/kernels.cpp for one instruction set."""

    instruction_set: str
    tape: Tape
    pack: Function
    bf16_linear: Function
    quantize: Function
    int8_linear: Function
    int4_linear: Function
    rms_norm: Function
    gate: Function
    layer_norm: Function
    add: Function
    pointwise: Function
    attend: Function
    embedding: Function
    choose: Function
    replay: Function


def why_absent() -> str | None:
    """Why there are no kernels; None if there are some."""
    found = _found()
    return found if isinstance(found, str) else None


def load_kernels() -> Kernels | None:
    """The kernels for this processor; None where ``why_absent`` says why."""
    found = _found()
    return None if isinstance(found, str) else found


@cache
def _found() -> Kernels | str:
    wanted = os.environ.get(VARIABLE, "")
    if wanted == "off":
        return f"{VARIABLE}=off"
    if not LIBRARY.exists():
        return (
            "they were not compiled when dovetail-cpu was installed; install a C++ compiler and"
            " install dovetail-cpu again"
        )
    openmp = _loaded_openmp()
    if openmp is None:
        return "torch has loaded no OpenMP whose threads they could share"
    ctypes.CDLL(openmp, mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(LIBRARY))
    library.instruction_set.restype = ctypes.c_char_p
    best = library.instruction_set().decode()
    if not best:
        return "this processor has neither AVX2 nor a later instruction set"
    return _functions(library, _checked(wanted, best) if wanted else best)


def _checked(wanted: str, best: str) -> str:
    known = INSTRUCTION_SETS[INSTRUCTION_SETS.index(best) :]
    usable = known if best == "generic" else known[:-1]
    if wanted not in usable:
        raise PluginError(
            f"{VARIABLE}={wanted}: this processor can use {', '.join(usable)}, or 'off'."
        )
    return wanted


def _functions(library: ctypes.CDLL, suffix: str) -> Kernels:
    functions, tape = {}, Tape()
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"{name}_{suffix}")
        function.argtypes, function.restype = arguments, None
        number = _REPLAYED.index(name) + 1 if name in _REPLAYED else 0
        functions[name] = Function(function, number, tape)
    return Kernels(suffix, tape, **functions)


def _loaded_openmp() -> str | None:
    """Path of the OpenMP that torch's threads are those of: its own, if it has one."""
    folder = Path(torch.__file__).parent
    own = [folder / "lib", folder.with_name("torch.libs")]
    shipped = (str(path) for place in own if place.is_dir() for path in sorted(place.iterdir()))
    return next(filter(_OPENMP.search, (*shipped, *_mapped())), None)


def _mapped() -> Iterator[str]:
    """Files in this process's memory, where the system tells."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text().splitlines():
            yield from line.split(maxsplit=5)[5:]
