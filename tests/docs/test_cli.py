"""The guide to the command line names flags and workloads that exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

from dovetail.core.bench.named import WORKLOADS
from dovetail.core.cli.entry import BENCH_COMMANDS, COMMANDS
from dovetail.core.cli.parser import Parser

TEXT = (Path(__file__).parents[2] / "docs" / "cli.md").read_text("utf-8")


def flags() -> set[str]:
    """Of all commands."""
    found = {"--help"}
    for commands in (COMMANDS, BENCH_COMMANDS):
        for module, text in commands.values():
            command = importlib.import_module(module)
            if hasattr(command, "add_arguments"):
                parser = Parser("dovetail", text)
                command.add_arguments(parser)
                found |= set(parser.flags())
    return found


def test_every_flag_of_the_guide_exists() -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT))
    assert {"--fit", "--workload", "--no-roofline"} <= named
    assert named <= flags()


def test_every_workload_is_in_the_guide() -> None:
    rows = re.findall(r"^\| (`(?:nano|\d)[^|]*) \|", TEXT, re.M)
    assert set(re.findall(r"`([^`]+)`", " ".join(rows))) == set(WORKLOADS)
