"""Flags from a YAML file: ``--config file.yaml``. The command line goes before the file."""

from __future__ import annotations

import argparse
import difflib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dovetail.core.cli.parser import Parser, UsageError
from dovetail.core.errors import ConfigError

__all__ = ["add_config_argument", "with_config_file"]

_FLAG = "--config"


def add_config_argument(parser: Parser) -> None:
    """Let the command take ``--config``."""
    parser.add_argument(
        _FLAG,
        metavar="FILE",
        help="YAML file whose entries are flags by name; flags on the command line go before it.",
    )


def with_config_file(parser: Parser, arguments: Sequence[str]) -> list[str]:
    """The arguments, preceded by those of the file that ``--config`` names, if it does.

    Raises:
        ConfigError: The file cannot be read, or holds an entry that is no flag; names both.
    """
    file = _named_file(arguments)
    if file is None or _FLAG not in parser.flags():
        return list(arguments)
    found: list[str] = []
    for key, value in _read(Path(file)).items():
        found += _as_arguments(parser, file, str(key), value)
    return found + list(arguments)


def _named_file(arguments: Sequence[str]) -> str | None:
    for index, argument in enumerate(arguments):
        if argument == "--":
            return None
        if argument == _FLAG and index + 1 < len(arguments):
            return arguments[index + 1]
        if argument.startswith(_FLAG + "="):
            return argument.partition("=")[2]
    return None


def _read(file: Path) -> dict[str, Any]:
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        raise ConfigError("--config needs the package PyYAML: pip install pyyaml") from None
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{file} must hold one entry per line, such as `max-model-len: 4096`")
    return content


def _as_arguments(parser: Parser, file: str, key: str, value: Any) -> list[str]:
    flag = "--" + key.replace("_", "-")
    action = parser.flags().get(flag)
    if action is None or flag == _FLAG:
        close = difflib.get_close_matches(flag, parser.flags(), n=1, cutoff=0.6)
        hint = f"; did you mean {close[0].removeprefix('--')!r}?" if close else ""
        raise UsageError(f"{file}: {key!r} is no flag of `{parser.prog}`{hint}")
    if value is None:
        return []
    if isinstance(value, bool):
        return _as_switch(action, flag, value)
    if isinstance(value, list):
        return [flag, *map(str, value)] if action.nargs else [f"{flag}={v}" for v in value]
    return [f"{flag}={json.dumps(value) if isinstance(value, dict) else value}"]


def _as_switch(action: argparse.Action, flag: str, value: bool) -> list[str]:
    if isinstance(action, argparse.BooleanOptionalAction):
        return [flag if value else "--no-" + flag.removeprefix("--")]
    if action.nargs == 0:
        return [flag] if value else []
    return [f"{flag}={str(value).lower()}"]
