"""``dovetail platforms``: what hardware can be used, what is chosen, and why not the others."""

from __future__ import annotations

import argparse
import os

from dovetail.core.cli.console import emit, note
from dovetail.core.cli.parser import Parser
from dovetail.core.errors import DovetailError

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.add_argument(
        "--device", metavar="NAME", help="Show what this --device would lead to, on any command."
    )


def run(namespace: argparse.Namespace) -> int:
    """Write the table; returns 1 if no platform can be chosen."""
    from dovetail.core.plugins.report import platforms_json, platforms_table
    from dovetail.core.plugins.selection import (
        Selection,
        choose,
        survey_platforms,
        unknown_plugins,
    )

    warning = unknown_plugins(os.environ)
    if warning is not None:
        note(f"dovetail: warning: {warning}")
    reports = survey_platforms(os.environ)
    selection: Selection | DovetailError
    try:
        selection = choose(reports, namespace.device, os.environ)
    except DovetailError as error:
        selection = error
    render = platforms_json if namespace.json else platforms_table
    emit(render(reports, selection))
    return 1 if isinstance(selection, DovetailError) else 0
