"""Kernels compiled ahead of time: for which GPUs, and how much of each they take."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Case", "Report", "TARGETS", "chosen_targets", "compile_all", "effort"]


@dataclass(frozen=True)
class Target:
    """A generation of GPUs."""

    backend: str
    arch: int | str
    warp_size: int
    shared_limit: int
    """Bytes of shared memory that one block may have."""


TARGETS: Mapping[str, Target] = {
    "sm_80": Target("cuda", 80, 32, 163 * 1024),
    "sm_90": Target("cuda", 90, 32, 227 * 1024),
    "sm_100": Target("cuda", 100, 32, 227 * 1024),
    "gfx90a": Target("hip", "gfx90a", 64, 64 * 1024),
    "gfx942": Target("hip", "gfx942", 64, 64 * 1024),
    "gfx950": Target("hip", "gfx950", 64, 160 * 1024),
}
"""By the names of their instruction sets."""

_EFFORT = "DOVETAIL_GPU_TARGETS"
_FEW = ("sm_90", "gfx942")


def effort() -> str:
    """What DOVETAIL_GPU_TARGETS says: ``few`` GPUs, one of each vendor; ``all``; or ``full``, all
    of them with every case."""
    word = os.environ.get(_EFFORT, "few")
    if word not in ("few", "all", "full"):
        raise ValueError(f"{_EFFORT} is few, all or full, not {word!r}")
    return word


def chosen_targets() -> tuple[str, ...]:
    """The GPUs that are compiled for."""
    return _FEW if effort() == "few" else tuple(TARGETS)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A kernel with the types and constants that it is launched with."""

    kernel: str
    """``package.module:function``"""
    signature: Mapping[str, str]
    """Type of each argument that is no constant, as Triton writes them: ``*bf16``, ``i32``."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    divisible: frozenset[str] = frozenset()
    """Arguments that are multiples of 16: numbers, and addresses in bytes. Loads are wider then."""
    num_warps: int = 4
    num_stages: int = 2


@dataclass(frozen=True)
class Report:
    """What a compiler made of a case for a target."""

    case: str
    target: str
    shared: int = 0
    """Bytes of shared memory."""
    spills: int = 0
    """Registers (AMD) or bytes (NVIDIA) that did not fit and go to memory."""
    matrix: bool = False
    """Matrix instructions are used."""
    error: str = ""


def compile_all(cases: str) -> list[Report]:
    """Compile every case for every target that it names, in a process that interprets nothing.

    Args:
        cases: A module whose ``cases(target)`` gives ``Case`` by name: launches differ between
            generations, as tuned tables do.
    """
    environ = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", __name__, cases],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"compiling failed as a whole:\n{done.stderr[-4000:]}")
    return [Report(**json.loads(line)) for line in done.stdout.splitlines()]


def _reports(module: str) -> Iterator[Report]:
    cases = importlib.import_module(module).cases
    for target in chosen_targets():
        for name, case in cases(target).items():
            try:
                yield _compile(name, case, target)
            except Exception as error:
                yield Report(name, target, error=f"{type(error).__name__}: {error}"[:2000])


def _compile(name: str, case: Case, target: str) -> Report:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    where = TARGETS[target]
    module, function = case.kernel.split(":")
    kernel = getattr(importlib.import_module(module), function)
    kernel = getattr(kernel, "fn", kernel) if not hasattr(kernel, "arg_names") else kernel
    signature = {**case.signature, **dict.fromkeys(case.constants, "constexpr")}
    source = ASTSource(
        kernel,
        {n: signature[n] for n in kernel.arg_names},
        dict(case.constants),
        {
            (index,): [["tt.divisibility", 16]]
            for index, name in enumerate(kernel.arg_names)
            if name in case.divisible
        },
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    compiled = triton.compile(
        source, target=GPUTarget(where.backend, where.arch, where.warp_size), options=options
    )
    text = compiled.asm["ptx" if where.backend == "cuda" else "amdgcn"]
    spills = _cuda_spills(text, where) if where.backend == "cuda" else _hip_spills(text)
    matrix = bool(re.search(r"\b(mma\.sync|wgmma|tcgen05\.mma|v_(s?)mfma)", text))
    return Report(name, target, compiled.metadata.shared, spills, matrix)


def _hip_spills(assembly: str) -> int:
    found = re.search(r"\.vgpr_spill_count:\s*(\d+)", assembly)
    if found is None:
        raise ValueError("the assembly does not count its spilled registers")
    return int(found[1])


def _cuda_spills(ptx: str, target: Target) -> int:
    from triton.backends.nvidia.compiler import get_ptxas

    arch = re.search(r"^\.target (\w+)", ptx, re.M)
    if arch is None:
        raise ValueError("the PTX names no target")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "kernel.ptx")
        file.write_text(ptx)
        assembler = get_ptxas(int(target.arch))
        done = subprocess.run(
            [assembler.path, "-v", f"-arch={arch[1]}", str(file), "-o", f"{folder}/kernel.cubin"],
            capture_output=True,
            text=True,
            check=True,
        )
    found = re.findall(r"(\d+) bytes spill stores", done.stderr)
    if not found:
        raise ValueError(f"ptxas does not count spilled bytes: {done.stderr[:500]}")
    return sum(map(int, found))


if __name__ == "__main__":
    for report in _reports(sys.argv[1]):
        print(json.dumps(asdict(report)))
