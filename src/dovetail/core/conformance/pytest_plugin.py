"""Options of the kit under pytest, and nothing else: pytest loads this in every run.

An option is known only where the kit's tests are asked for, so that no other project's options are
touched. A conftest.py could not do it: pytest reads those of ``--pyargs`` packages after the
command line.
"""

from __future__ import annotations

from typing import Any

__all__ = ["pytest_load_initial_conftests"]

_PACKAGE = "dovetail.core.conformance"


class Options:
    """Registered where they are needed."""

    @staticmethod
    def pytest_addoption(parser: Any) -> None:
        """``--platform``, several times for several, and ``--known-gaps``."""
        group = parser.getgroup("dovetail", "conformance of platforms")
        group.addoption(
            "--platform",
            action="append",
            metavar="NAME",
            help="Platform to certify; may be given several times.",
        )
        group.addoption(
            "--known-gaps",
            metavar="FILE",
            help="Lines `check name: reason`, in place of the known_gaps.txt of the plug-in.",
        )
        group.addoption(
            "--conformance-level",
            type=int,
            choices=(1, 2, 3),
            default=3,
            help="1: the contract; 2: ops, attention, collectives as well; 3: whole models too.",
        )


def pytest_load_initial_conftests(early_config: Any, args: list[str]) -> None:
    """Add the options if the kit is among what is to be tested."""
    if any(_PACKAGE in argument.replace("/", ".") for argument in args):
        early_config.pluginmanager.register(Options, "dovetail-conformance-options")
