"""Wheels hold every module and every data file of the tree, and nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECTS = [ROOT, *sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))]
MADE_BY_TOOLS = ("__pycache__", "*.egg-info", "*.so")
"""Folders and files that tools leave in a source tree, at times while a test reads it."""

TOP_FILES = ("pyproject.toml", "README.md", "LICENSE", "setup.py", "hatch_build.py")
COMPILED = {"dovetail-cpu": {"dovetail_cpu/libkernels.so"}}
"""What only the wheels of some projects have: libraries that are built with them."""


@cache
def build(project: Path, folder: Path) -> Path:
    """The wheel of a clean copy of the project, made once; needs no network."""
    folder = folder / project.name
    copy = folder / "copy"
    shutil.copytree(project / "src", copy / "src", ignore=shutil.ignore_patterns(*MADE_BY_TOOLS))
    for name in TOP_FILES:
        if (project / name).exists():
            shutil.copy(project / name, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps"]
    options = ["--no-build-isolation", "--wheel-dir", str(folder), str(copy)]
    quickly = {**os.environ, "CXXFLAGS": "-O0"}  # of what is compiled, nothing is run
    done = subprocess.run([*command, *options], env=quickly, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wheels")


def files(folder: Path) -> set[str]:
    """Paths of what people wrote, relative to the folder."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {path.as_posix() for path in found if not made_by_tools(path)}


def made_by_tools(path: Path) -> bool:
    return any(fnmatch(part, pattern) for part in path.parts for pattern in MADE_BY_TOOLS)


def difference(source: Path, wheel: Path) -> dict[str, set[str]]:
    """Files of the source folder that the wheel lacks, and files that only the wheel has."""
    tree = files(source)
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    return {"missing": tree - packed, "added": packed - tree}


@pytest.mark.parametrize("project", PROJECTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_wheel_holds_the_tree(project: Path, folder: Path) -> None:
    wheel = build(project, folder)
    compiled = COMPILED.get(project.name, set())
    assert difference(project / "src", wheel) == {"missing": set(), "added": compiled}


def test_the_wheel_says_what_it_offers_and_under_which_licence(folder: Path) -> None:
    with zipfile.ZipFile(build(ROOT, folder)) as archive:
        names = {name.partition(".dist-info/")[2] for name in archive.namelist()}
        (entry_points,) = (n for n in archive.namelist() if n.endswith("entry_points.txt"))
        text = archive.read(entry_points).decode()
    assert "licenses/LICENSE" in names
    assert "null = dovetail.platforms.null:PLUGIN" in text


def test_a_difference_is_found(tmp_path: Path) -> None:
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "data.toml").touch()
    (tmp_path / "src" / "__pycache__").mkdir()
    (tmp_path / "src" / "__pycache__" / "made.cpython-311.pyc.139706568528000").touch()
    (tmp_path / "src" / "x.egg-info").mkdir()
    (tmp_path / "src" / "x.egg-info" / "PKG-INFO").touch()
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("stale.py", "")
        archive.writestr("x-1.dist-info/METADATA", "")
    assert difference(tmp_path / "src", wheel) == {"missing": {"data.toml"}, "added": {"stale.py"}}
