"""``dovetail doctor``: what is installed, usable and broken, why, and what to do about it."""

from __future__ import annotations

import argparse
import os

from dovetail.core.cli.console import emit
from dovetail.core.cli.parser import Parser, checked
from dovetail.core.config.parsers import seconds

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.add_argument(
        "--device", metavar="NAME", help="Examine what this --device would lead to, on any command."
    )
    parser.add_argument(
        "--timeout",
        type=checked("--timeout", seconds),
        metavar="S",
        help="Seconds that importing a plug-in, or starting the chosen platform, may take. "
        "Default: 30, and 60 for the platform.",
    )


def run(namespace: argparse.Namespace) -> int:
    """Examine everything; returns 1 if something stands in the way of what was asked for."""
    from dovetail.core.plugins.diagnosis import diagnose
    from dovetail.core.plugins.doctor_report import doctor_json, doctor_text
    from dovetail.core.plugins.examination import examine_installation

    examination = examine_installation(namespace.device, os.environ, timeout=namespace.timeout)
    findings = diagnose(examination)
    render = doctor_json if namespace.json else doctor_text
    emit(render(examination, findings))
    return 1 if any(finding.serious for finding in findings) else 0
