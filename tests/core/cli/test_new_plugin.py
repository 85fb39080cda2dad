"""A new plug-in works from the first minute: it installs, is found, serves, and keeps our style."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dovetail.core.cli import main
from dovetail.core.errors import ConfigError
from dovetail.core.template import plugin_files, write_plugin
from tests.commands import dovetail, environment, install
from tests.thorough import thorough

ROOT = Path(__file__).parents[3]
NAME = "acme-two"
LONGEST_NAME = "a-name-of-24-characters1"
PROMPT = ("generate", "def add(a, b):", "--max-tokens", "12", "--temperature", "0", "--json")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new")
    done = dovetail("new-plugin", NAME, "--directory", str(folder))
    assert done.returncode == 0, done.stderr
    assert f"pip install -e {folder / 'dovetail-acme-two'}" in done.stdout
    return folder / "dovetail-acme-two"


@pytest.fixture(scope="module")
def target(project: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("target")
    install(project, folder)
    return folder


def test_it_is_found_and_usable_but_not_chosen_by_itself(target: Path) -> None:
    done = dovetail("platforms", "--json", folder=target)
    found = json.loads(done.stdout)
    (mine,) = (p for p in found["platforms"] if p["name"] == NAME)
    assert (mine["probe"], mine["distribution"]) == ("usable", "dovetail-acme-two")
    assert found["selected"] != NAME


def test_it_is_what_doctor_starts_when_it_is_named(target: Path) -> None:
    command = ("doctor", "--json", "--device", NAME)
    done = dovetail(*command, folder=target, DOVETAIL_PLUGINS=NAME)
    found = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert found["start"]["attention"][:2] == ["sdpa", "reference"]


def test_it_generates_what_the_reference_platform_does(target: Path) -> None:
    settings = ("--dtype", "float32")
    mine = dovetail(*PROMPT, *settings, "--device", NAME, folder=target)
    assert mine.returncode == 0, mine.stderr
    reference = dovetail(*PROMPT, *settings, "--device", "reference")
    assert json.loads(mine.stdout) == json.loads(reference.stdout)


@thorough
def test_it_keeps_the_contract_by_both_ways_of_asking(project: Path, target: Path) -> None:
    done = dovetail("conformance", "--device", NAME, "--level", "1", folder=target)
    assert done.returncode == 0, done.stdout + done.stderr
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(project / "tests")],
        env=environment(target),
        cwd=project,
        capture_output=True,
        text=True,
    )
    assert tests.returncode == 0, tests.stdout


def test_its_code_is_styled_as_ours(tmp_path: Path) -> None:
    project, _ = write_plugin(LONGEST_NAME, tmp_path)
    for tool in (["ruff", "check", "."], ["ruff", "format", "--check", "."]):
        check(tool, project)


@thorough
def test_its_code_is_typed(tmp_path: Path) -> None:
    # With ours and by our settings, which are its own, too: so what `make lint` found serves again,
    # and torch is not read anew, which takes half a minute or more.
    project, _ = write_plugin(LONGEST_NAME, tmp_path)
    ours = [str(folder) for folder in (ROOT / "src", *sorted(ROOT.glob("plugins/*/src")))]
    check(["mypy", *ours, str(project / "src")], ROOT)
    platform = next(project.glob("src/*/platform.py"))
    platform.write_text(platform.read_text() + '\nWRONG: int = "text"\n')
    check(["mypy", *ours, str(project / "src")], ROOT, fails_with="Incompatible types")


def check(command: list[str], folder: Path, fails_with: str | None = None) -> None:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == (0 if fails_with is None else 1), done.stdout + done.stderr
    assert (fails_with or "") in done.stdout


def test_its_settings_are_ours() -> None:
    mine = tomllib.loads(plugin_files(NAME)["pyproject.toml"])["tool"]
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert mine["ruff"]["line-length"] == ours["ruff"]["line-length"]
    assert mine["ruff"]["lint"]["select"] == ours["ruff"]["lint"]["select"]
    assert mine["ruff"]["lint"]["ignore"] == ours["ruff"]["lint"]["ignore"]
    assert mine["mypy"] == {"strict": True, "files": ["src"]}
    assert ours["mypy"]["strict"]


def test_nothing_is_left_to_fill_in() -> None:
    for path, text in plugin_files(NAME).items():
        assert "@" not in path
        assert not any(mark in text for mark in ("@NAME@", "@PACKAGE@", "@CLASS@", "@DOVETAIL@"))


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = write_plugin("acme", tmp_path)
    (folder / "README.md").write_text("mine")
    assert main(["new-plugin", "acme", "--directory", str(tmp_path)]) == 1
    assert "is there already, and nothing is ever overwritten" in capsys.readouterr().err
    assert (folder / "README.md").read_text() == "mine"


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot be made"):
        write_plugin("acme", tmp_path / "file")


@pytest.mark.parametrize(
    "name", ["", "Acme", "a_b", "9x", "a--b", "-a", "a-", "../x", "a" * 25, "auto", "dovetail"]
)
def test_names_that_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be the name of a platform"):
        write_plugin(name, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-plugin", "reference", "--directory", str(tmp_path)]) == 1
    assert "of dovetail 0.1.0: choose another name" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
