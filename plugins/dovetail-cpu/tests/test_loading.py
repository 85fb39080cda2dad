"""Which kernels are used, why there are none, and how they are compiled."""

from __future__ import annotations

import importlib.util
import json
import logging
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cpu_kernels import NAMES
from dovetail_cpu import kernels, platform
from dovetail_cpu.attention import NativeAttention
from dovetail_cpu.linear import PanelLinear
from dovetail_cpu.platform import CpuPlatform
from safetensors.torch import load_file, save_file

from dovetail.core.contracts.ops import OpTable
from dovetail.core.errors import PluginError
from dovetail.platforms.torch.ops import references
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core

PACKAGE = Path(__file__).parents[1]
_WEIGHTS = "model.safetensors"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What was found before is forgotten, and what these tests find afterwards."""
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    kernels._found.cache_clear()
    platform._warn.cache_clear()
    yield
    kernels._found.cache_clear()
    platform._warn.cache_clear()


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_they_are_compiled_where_there_is_a_compiler() -> None:
    """Else every test of the kernels would be skipped, unseen."""
    assert kernels.LIBRARY.exists()


def test_the_openmp_of_torch_comes_before_others(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "torch" / "lib").mkdir(parents=True)
    for name in ("libbackend_with_compiler.so", "libtorch_cpu.so"):
        (tmp_path / "torch" / "lib" / name).touch()
    monkeypatch.setattr(kernels.torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    monkeypatch.setattr(kernels, "_mapped", lambda: iter(["/usr/lib/libm.so", "/x/libgomp.so.1"]))
    assert kernels._loaded_openmp() == "/x/libgomp.so.1"
    (tmp_path / "torch.libs").mkdir()
    own = tmp_path / "torch.libs" / "libgomp-a34b3233.so.1"
    own.touch()
    assert kernels._loaded_openmp() == str(own)
    own.unlink()
    monkeypatch.setattr(kernels, "_mapped", lambda: iter(["/usr/lib/libm.so"]))
    assert kernels._loaded_openmp() is None


def test_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "off")
    assert kernels.load_kernels() is None
    assert kernels.why_absent() == "DOVETAIL_CPU_KERNELS=off"


def test_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "libkernels.so")
    assert kernels.load_kernels() is None
    reason = kernels.why_absent()
    assert reason is not None
    assert "install a C++ compiler" in reason


def test_no_openmp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libkernels.so").touch()
    monkeypatch.setattr(kernels, "LIBRARY", tmp_path / "libkernels.so")
    monkeypatch.setattr(kernels, "_loaded_openmp", lambda: None)
    assert kernels.load_kernels() is None
    assert "no OpenMP" in str(kernels.why_absent())


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_processor_without_any_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    source, library = tmp_path / "none.cpp", tmp_path / "libkernels.so"
    source.write_text('extern "C" const char* instruction_set(void) { return ""; }')
    subprocess.run(["c++", "-shared", "-fPIC", source, "-o", library], check=True)
    monkeypatch.setattr(kernels, "LIBRARY", library)
    assert kernels.load_kernels() is None
    assert "neither AVX2 nor" in str(kernels.why_absent())


@pytest.mark.skipif(not NAMES, reason="the kernels were not compiled")
@pytest.mark.parametrize("name", [*NAMES, ""])
def test_a_set_is_chosen(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, name)
    found = kernels.load_kernels()
    assert found is not None
    assert found.instruction_set == (name or NAMES[0])
    assert kernels.why_absent() is None


@pytest.mark.skipif(not NAMES, reason="the kernels were not compiled")
def test_an_unknown_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(kernels.VARIABLE, "sse2")
    with pytest.raises(PluginError, match=f"sse2: this processor can use {NAMES[0]}.*or 'off'"):
        kernels.load_kernels()


def test_a_set_that_the_processor_lacks() -> None:
    assert kernels._checked("avx2", "avx2") == "avx2"
    assert kernels._checked("avx512", "avx512_bf16") == "avx512"
    assert kernels._checked("avx512_bf16", "amx") == "avx512_bf16"
    assert kernels._checked("generic", "generic") == "generic"
    for wanted, best in [
        ("amx", "avx2"),
        ("avx512", "avx2"),
        ("generic", "avx2"),
        ("avx2", "generic"),
    ]:
        with pytest.raises(PluginError, match=f"{wanted}: this processor can use {best}, or 'off'"):
            kernels._checked(wanted, best)


def test_a_platform_without_kernels_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:

    monkeypatch.setenv(kernels.VARIABLE, "off")
    cpu, table = CpuPlatform(), OpTable(references())
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            cpu.override_ops(table)
    (record,) = caplog.records
    assert "torch's slower ops are used: DOVETAIL_CPU_KERNELS=off" in record.getMessage()
    assert not table.overrides
    assert not any(isinstance(each, NativeAttention) for each in cpu.attention_backends())
    weight = torch.randn(4, 6).bfloat16()
    layer = cpu.bind_linear(weight, None)
    assert not isinstance(layer, PanelLinear)
    assert layer(torch.ones(2, 6).bfloat16()).shape == (2, 4)


class App:
    """As the builder's, but that it keeps what is said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def display_warning(self, message: str) -> None:
        self.said.append(message)


@pytest.fixture
def build() -> Any:
    pytest.importorskip("hatchling")
    spec = importlib.util.spec_from_file_location("hatch_build", PACKAGE / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiler(folder: Path, script: str) -> str:
    path = folder / "compiler"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


def run_hook(build: Any, root: Path) -> tuple[list[str], dict[str, Any]]:
    """What the hook says, and the data of the build behind it."""
    shutil.copytree(PACKAGE / build.SOURCES, root / build.SOURCES, dirs_exist_ok=True)
    (root / build.LIBRARY).write_text("of an earlier build")
    app, data = App(), {"artifacts": []}
    build.CompileKernels(str(root), {}, None, None, str(root), "wheel", app).initialize("", data)
    return app.said, data


def test_no_compiler(build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", "/nonexistent")
    with pytest.raises(OSError, match="nonexistent"):
        build.compile_library(PACKAGE / build.SOURCES, tmp_path / "libkernels.so")
    (said,), data = run_hook(build, tmp_path)
    assert "/nonexistent" in said
    assert "Install a C++ compiler" in said
    assert data == {"artifacts": []}
    assert not (tmp_path / build.LIBRARY).exists()


def test_a_compiler_that_fails(build: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CXX", compiler(tmp_path, "echo too old for this >&2; exit 3"))
    with pytest.raises(subprocess.CalledProcessError):
        build.compile_library(PACKAGE / build.SOURCES, tmp_path / "libkernels.so")
    (said,), data = run_hook(build, tmp_path)
    assert "too old for this" in said
    assert data == {"artifacts": []}
    assert not (tmp_path / build.LIBRARY).exists()


@pytest.mark.parametrize(
    ("machine", "suffixes"),
    [("x86_64", ["amx", "avx2", "avx512", "avx512_bf16"]), ("aarch64", ["generic"])],
)
def test_every_set_is_compiled(
    machine: str,
    suffixes: list[str],
    build: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    log = tmp_path / "log"
    script = f'echo "$@" >> {log}; for last; do :; done; echo made > "$last"'
    monkeypatch.setenv("CXX", f"{compiler(tmp_path, script)} --first")
    monkeypatch.setenv("CXXFLAGS", "-DMINE")
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    said, data = run_hook(build, tmp_path)
    assert said == []
    assert data["artifacts"] == [f"/{build.LIBRARY}"]
    assert data["tag"].startswith("py3-none-")
    assert (tmp_path / build.LIBRARY).read_text() == "made\n"
    *compiled, linked = log.read_text().splitlines()
    found = [re.search(r"-DSUFFIX=(\w+) ", line) for line in compiled]
    assert sorted(match[1] if match else "" for match in found) == suffixes
    assert all(line.startswith("--first ") and " -DMINE " in line for line in compiled)
    assert "-shared" in linked


def test_a_checkpoint_in_float16_is_computed_in_bfloat16(tmp_path: Path) -> None:
    half = make_checkpoint("llama", tmp_path / "half", dtype="float16")
    rounded = make_checkpoint("llama", tmp_path / "rounded", dtype="float16")
    weights = {name: w.bfloat16() for name, w in load_file(rounded / _WEIGHTS).items()}
    save_file(weights, rounded / _WEIGHTS, metadata={"format": "pt"})
    config = json.loads((rounded / "config.json").read_text())
    (rounded / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    prompts = [[3, 4, 5], list(range(3, 60))]
    found, wanted = (
        [(a.token_ids, a.logprobs) for a in answer(make_core(path, "cpu", dtype="auto"), prompts)]
        for path in (half, rounded)
    )
    assert found == wanted
