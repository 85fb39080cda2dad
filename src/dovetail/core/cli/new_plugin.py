"""``dovetail new-plugin NAME``: write a package for another kind of hardware, to begin with."""

from __future__ import annotations

import argparse
import os
import shlex
from pathlib import Path

from dovetail.core.cli.console import emit
from dovetail.core.cli.parser import Parser
from dovetail.core.errors import ConfigError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    parser.add_argument(
        "name", metavar="NAME", help="Name of the platform, as --device will have it, such as acme."
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path(),
        metavar="D",
        help="Where the folder dovetail-NAME is made. Default: here.",
    )


def run(namespace: argparse.Namespace) -> int:
    """Write the package, and say what comes next."""
    from dovetail.core.template import plugin_files, write_plugin

    name = namespace.name
    plugin_files(name)
    _refuse_taken(name)
    folder, paths = write_plugin(name, namespace.directory)
    emit(f"Wrote dovetail-{name} to {folder}:")
    for path in paths:
        emit(f"  {path}")
    emit("\nNext:")
    for command in _next_commands(name, folder):
        emit(f"  {command}")
    emit(f"\n{folder / 'README.md'} says how to make it yours.")
    return 0


def _refuse_taken(name: str) -> None:
    from dovetail.core.plugins.selection import platform_registry

    registry = platform_registry(os.environ)
    rivals = [e for e in (*registry.entries, *registry.excluded) if e.name == name]
    if rivals:
        raise ConfigError(
            f"there is a platform {name!r} already, of {rivals[0].origin}: choose another name"
        )


def _next_commands(name: str, folder: Path) -> list[str]:
    where = str(folder) if folder.is_absolute() else f"./{folder}"
    return [
        f"pip install -e {shlex.quote(where)}",
        "dovetail platforms",
        f'dovetail generate "def add(a, b):" --device {name}',
        f"dovetail conformance --device {name} --level 1",
    ]
