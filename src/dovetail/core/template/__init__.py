"""A package for another kind of hardware, to begin with: it works, and says what to change."""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

from dovetail.core.contracts.platform import API_VERSION
from dovetail.core.errors import ConfigError

__all__ = ["plugin_files", "write_plugin"]

_FILES = {
    "pyproject.toml": "pyproject.toml.in",
    "README.md": "README.md.in",
    "src/@PACKAGE@/__init__.py": "init.py.in",
    "src/@PACKAGE@/platform.py": "platform.py.in",
    "src/@PACKAGE@/known_gaps.txt": "known_gaps.txt.in",
    "src/@PACKAGE@/py.typed": "py.typed.in",
    "tests/test_conformance.py": "test_conformance.py.in",
    ".github/workflows/test.yml": "workflow.yml.in",
}
"""Paths in the new folder, with the templates that they are made from."""

_NAME = re.compile(r"[a-z][a-z0-9]*(-[a-z0-9]+)*")
_MAX_NAME = 24
_RESERVED = ("auto", "none", "dovetail", "core")


def plugin_files(name: str) -> dict[str, str]:
    """The files of the distribution ``dovetail-NAME``: texts by path.

    Raises:
        ConfigError: The name cannot be a platform's; says what can.
    """
    if not _NAME.fullmatch(name) or len(name) > _MAX_NAME or name in _RESERVED:
        raise ConfigError(
            f"{name!r:.80} cannot be the name of a platform: it takes small letters and digits,"
            f" in words that a dash joins, a letter first, at most {_MAX_NAME} characters, and"
            f" none of {', '.join(_RESERVED)}"
        )
    words = {
        "@NAME@": name,
        "@API_VERSION@": str(API_VERSION),
        "@PACKAGE@": f"dovetail_{name.replace('-', '_')}",
        "@CLASS@": "".join(word.capitalize() for word in name.split("-")) + "Platform",
        "@DOVETAIL@": _requirement(version("dovetail")),
    }
    folder = files("dovetail.core.template") / "files"
    return {
        _filled(path, words): _filled((folder / source).read_text(encoding="utf-8"), words)
        for path, source in _FILES.items()
    }


def write_plugin(name: str, directory: Path) -> tuple[Path, tuple[str, ...]]:
    """Write the distribution into a new folder ``dovetail-NAME`` of the directory.

    Returns:
        The folder, and the paths of the files in it.

    Raises:
        ConfigError: The name is not allowed, or the folder is there already or cannot be made.
    """
    texts = plugin_files(name)
    folder = directory / f"dovetail-{name}"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{folder} is there already, and nothing is ever overwritten: name another"
            " --directory, or remove it"
        ) from None
    except OSError as error:
        raise ConfigError(f"{folder} cannot be made: {error}") from error
    for path, text in texts.items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return folder, tuple(texts)


def _requirement(installed: str) -> str:
    """The versions of Dovetail that speak the interface of this one."""
    major, minor = (int(part) for part in installed.split(".")[:2])
    return f"dovetail>={major}.{minor},<{major}.{minor + 1}"


def _filled(text: str, words: dict[str, str]) -> str:
    for mark, word in words.items():
        text = text.replace(mark, word)
    return text
