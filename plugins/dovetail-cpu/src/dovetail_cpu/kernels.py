"""The compiled kernels: which of them this processor has, and how they are called.

They take addresses and sizes, know nothing of torch but its threads, and are compiled when the
package is installed (``hatch_build.py``).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable, Iterator
from ctypes import c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import torch

from dovetail.core.errors import PluginError

__all__ = ["HeadsStruct", "Kernels", "LayerStruct", "StepStruct", "load_kernels", "why_absent"]

LIBRARY = Path(__file__).with_name("libkernels.so")
VARIABLE = "DOVETAIL_CPU_KERNELS"
"""Environment: an instruction set to use instead of the best, or ``off``."""
INSTRUCTION_SETS = ("avx512_bf16", "avx512", "avx2", "generic")
"""Best first. A processor that has one of x86 has those behind it."""

_Function: TypeAlias = Callable[..., None]


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


_P, _N = c_void_p, c_int64
_ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "pack": (_P, _N, _N, _P),
    "bf16_linear": (_P, _N, _N, _N, _P, _N, _P, _N, _P, _N),
    "quantize": (_P, _N, _N, _N, _P, _P),
    "int8_linear": (_P, _P, _N, _N, _P, _P, _P, _N, _P, _N, _P, _N),
    "rms_norm": (_P, _P, _N, _N, _P, _N, c_float, _P, _P),
    "gate": (_P, _N, _N, _N, _P),
    "attend": (_P, _P, _P, _P, _P),
}


@dataclass(frozen=True)
class Kernels:
    """The functions of native/kernels.cpp for one instruction set."""

    instruction_set: str
    pack: _Function
    bf16_linear: _Function
    quantize: _Function
    int8_linear: _Function
    rms_norm: _Function
    gate: _Function
    attend: _Function


def why_absent() -> str | None:
    """Why there are no kernels; None if there are some."""
    return _found() if isinstance(_found(), str) else None


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
    functions = {}
    for name, arguments in _ARGUMENTS.items():
        function = getattr(library, f"{name}_{suffix}")
        function.argtypes, function.restype = arguments, None
        functions[name] = function
    return Kernels(suffix, **functions)


def _loaded_openmp() -> str | None:
    """Path of the OpenMP that torch's threads are those of."""
    return next(iter(_mapped()), None) or next(iter(_shipped()), None)


def _mapped() -> Iterator[str]:
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text().splitlines():
            path = line.split(maxsplit=5)[5:]
            if path and re.search(r"/lib(gomp|iomp5|omp)[-.][^/]*$", path[0]):
                yield path[0]


def _shipped() -> Iterator[str]:
    folder = Path(torch.__file__).parent / "lib"
    yield from (str(path) for path in sorted(folder.glob("lib*omp*")))
