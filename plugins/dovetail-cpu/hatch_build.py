"""Compiles the kernels while the package is built, with the system's C++ compiler.

Without one the package is built all the same, and says so here and whenever it is used: torch's own
ops then do the work.
"""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

SOURCES = Path("src", "dovetail_cpu", "native")
LIBRARY = Path("src", "dovetail_cpu", "libkernels.so")
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fPIC", "-Wno-psabi")
_AVX512_BF16 = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
INSTRUCTION_SETS: dict[str, tuple[str, ...]] = {
    "avx2": ("-march=x86-64-v3",),
    "avx512": ("-march=x86-64-v4",),
    "avx512_bf16": _AVX512_BF16,
    "amx": (*_AVX512_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
"""The sets of x86 that are compiled, by the suffix of their functions."""


class CompileKernels(BuildHookInterface):  # type: ignore[type-arg]
    """See the module."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Put the library beside the modules, and into the wheel."""
        root = Path(self.root)
        (root / LIBRARY).unlink(missing_ok=True)
        try:
            compile_library(root / SOURCES, root / LIBRARY)
        except (OSError, subprocess.CalledProcessError) as error:
            said = getattr(error, "stderr", None) or error
            self.app.display_warning(
                f"dovetail-cpu: the kernels were not compiled, and torch's slower ops will be used:"
                f" {said}\nInstall a C++ compiler (on Debian: apt-get install g++), or name it in"
                " CXX, and install dovetail-cpu again."
            )
            return
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["tag"] = f"py3-none-{tag}"
        build_data["artifacts"].append(f"/{LIBRARY}")


def compile_library(sources: Path, library: Path) -> None:
    """Compile every instruction set of this kind of processor and link them.

    Environment: CXX and CXXFLAGS, as for make.

    Raises:
        OSError: There is no compiler.
        subprocess.CalledProcessError: It failed; ``stderr`` says why.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    flags = [*FLAGS, *shlex.split(os.environ.get("CXXFLAGS", ""))]
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    sets = INSTRUCTION_SETS if is_x86 else {"generic": ()}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = [str(Path(folder, f"{suffix}.o")) for suffix in sets]
        source = str(sources / "kernels.cpp")
        commands = [
            [*compiler, *flags, "-fopenmp", *own, f"-DSUFFIX={suffix}", "-c", source, "-o", target]
            for (suffix, own), target in zip(sets.items(), objects, strict=True)
        ]
        list(pool.map(_run, commands))
        # OpenMP is not linked: the functions are those of the one that torch has loaded.
        common = str(sources / "library.cpp")
        _run([*compiler, *flags, "-shared", *objects, common, "-o", str(library)])


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
