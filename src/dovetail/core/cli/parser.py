"""argparse with what users expect of it: one-line errors, suggestions, searchable help."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from dovetail.core.cli.help import brief_help, full_help, search_help
from dovetail.core.errors import ConfigError

__all__ = ["Parser", "UsageError"]


class UsageError(ConfigError):
    """The command line itself is wrong; ends the command with status 2."""


class Parser(argparse.ArgumentParser):
    """A parser that raises :class:`UsageError` instead of ending the process.

    Flags may be written with dashes or underscores. ``--help`` shows the command and the names
    of its flags, ``--help=all`` everything, ``--help=WORD`` what has to do with a word.
    """

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(prog=prog, description=description, add_help=False, allow_abbrev=False)
        self.folded: set[str] = set()
        """Groups of which the short help shows names only."""

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace | None:
        """The parsed arguments; None if help was asked for, and shown.

        Raises:
            UsageError: An argument is unknown, missing or has a value that is not allowed.
        """
        arguments = with_dashes(arguments)
        wanted = _asks_for_help(arguments)
        if wanted is not None:
            sys.stdout.write(self._help(wanted))
            return None
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            self._refuse(unknown[0])
        return namespace

    def flags(self) -> dict[str, argparse.Action]:
        """Every shown flag with its action."""
        return {
            flag: action
            for action in self._actions
            if action.help is not argparse.SUPPRESS
            for flag in action.option_strings
        }

    def error(self, message: str) -> NoReturn:
        """Called by argparse; raises UsageError."""
        raise UsageError(f"{message}; see `{self.prog} --help`")

    def _help(self, wanted: str) -> str:
        if wanted == "":
            return brief_help(self, self.folded)
        return full_help(self) if wanted == "all" else search_help(self, wanted)

    def _refuse(self, argument: str) -> NoReturn:
        name = argument.split("=")[0]
        if not name.startswith("-"):
            self.error(f"unexpected argument {argument!r}")
        close = difflib.get_close_matches(name, self.flags(), n=1, cutoff=0.6)
        raise UsageError(
            f"unknown flag {name}"
            + (f"; did you mean {close[0]}?" if close else f"; see `{self.prog} --help=all`")
        )


def with_dashes(arguments: Sequence[str]) -> list[str]:
    """Flag names with dashes for underscores; values, and all after ``--``, stay as they are."""
    end = list(arguments).index("--") if "--" in arguments else len(arguments)
    return [_dash(a) for a in arguments[:end]] + list(arguments[end:])


def _dash(argument: str) -> str:
    if not argument.startswith("--"):
        return argument
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value


def _asks_for_help(arguments: Sequence[str]) -> str | None:
    """What ``--help`` is about: empty for the command as a whole; None if it is not asked for."""
    for argument in arguments:
        if argument == "--":
            return None
        if argument in ("-h", "--help"):
            return ""
        if argument.startswith("--help="):
            return argument.removeprefix("--help=")
    return None


def checked(name: str, parse: Any) -> Any:
    """A ``type`` for argparse whose ValueError text completes "``name`` must be"."""

    def convert(value: str) -> Any:
        try:
            return parse(value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"must be {error}, not {value!r:.80}") from None

    convert.__name__ = name
    return convert
