"""Flags for the engine, made from the fields of ``EngineConfig``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dovetail.core.cli.parser import Parser, checked
from dovetail.core.config.foreign import FOREIGN, SWITCHES
from dovetail.core.config.option import Option
from dovetail.core.config.schema import EngineConfig, engine_options

__all__ = ["add_engine_arguments", "engine_config"]

_FOREIGN_PREFIX = "foreign:"


def add_engine_arguments(parser: Parser) -> None:
    """Add a flag for each field of ``EngineConfig``, in its groups.

    Flags that were not given leave no trace in the namespace. Flags of vLLM that have no meaning
    here are taken too, hidden; :func:`engine_config` accepts or refuses them.
    """
    groups: dict[str, argparse._ArgumentGroup] = {}
    for entry in engine_options().values():
        if entry.group not in groups:
            groups[entry.group] = parser.add_argument_group(entry.group)
            parser.folded.add(entry.group)
        _add(groups[entry.group], entry)
    for name in FOREIGN:
        _add_foreign(parser, name)


def engine_config(namespace: argparse.Namespace) -> EngineConfig:
    """The intent that the flags express.

    Raises:
        ConfigError: Values that cannot be served, each named by its field.
    """
    given: dict[str, Any] = {}
    for name, value in vars(namespace).items():
        if name in engine_options():
            given[name] = value
        elif name.startswith(_FOREIGN_PREFIX):
            given[name.removeprefix(_FOREIGN_PREFIX)] = value
    return EngineConfig.from_kwargs(**given)


def _add(group: argparse._ArgumentGroup, entry: Option) -> None:
    flags = ["--" + name.replace("_", "-") for name in (entry.name, *entry.aliases)]
    settings: dict[str, Any] = {
        "dest": entry.name,
        "default": argparse.SUPPRESS,
        "help": _help(entry),
    }
    if entry.is_switch:
        settings["action"] = argparse.BooleanOptionalAction
    else:
        settings["metavar"] = _metavar(entry)
        settings["type"] = str if entry.repeats else checked(flags[0], entry.normalise)
        if entry.repeats:
            settings["nargs"] = "+"
    group.add_argument(*flags, **settings)


def _metavar(entry: Option) -> str:
    if entry.choices:
        return "{" + ",".join(entry.choices) + "}"
    return entry.metavar or entry.name.split("_")[-1].upper()


def _help(entry: Option) -> str:
    text = entry.help.replace("%", "%%")
    if entry.default in (None, ()) or "Default:" in text:
        return text
    shown = {True: "on", False: "off"}.get(entry.default, entry.default)
    return f"{text} Default: {shown}."


def _add_foreign(parser: Parser, name: str) -> None:
    flag = "--" + name.replace("_", "-")
    if any(flag == known for known in parser._option_string_actions):
        return
    settings: dict[str, Any] = {
        "dest": _FOREIGN_PREFIX + name,
        "default": argparse.SUPPRESS,
        "help": argparse.SUPPRESS,
    }
    if name in SWITCHES:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **settings)
    else:
        parser.add_argument(flag, type=_plain_value, **settings)


def _plain_value(text: str) -> Any:
    """A number, an object or a word, as JSON would have it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
