"""``dovetail conformance``: whether a platform keeps its contracts, and what it does not do."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dovetail.core.cli.console import Progress, emit
from dovetail.core.cli.parser import Parser

__all__ = ["add_arguments", "run"]


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="Platform to look at, usable or not. Default: the one that any command would use.",
    )
    parser.add_argument(
        "--level",
        type=int,
        choices=(1, 2, 3),
        default=3,
        help="How much to look at. 1: the contract, nothing is computed. 2: ops, attention and "
        "collectives as well. 3: whole models too. Default: 3.",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="Run only checks of this name, such as ops.linear or 'attention.*.window.*'. May be "
        "given several times.",
    )
    parser.add_argument(
        "--known-gaps",
        type=Path,
        metavar="FILE",
        help="Lines `check name: reason` for what is known to fail, in place of the "
        "known_gaps.txt that the plug-in ships.",
    )
    parser.add_argument(
        "--share",
        type=_share,
        default=(1, 1),
        metavar="I/N",
        help="Run the I-th of N shares of the checks, as large as the others: several processes, "
        "or machines, then make a report each.",
    )
    parser.add_argument("--list", action="store_true", help="Show the checks and run none.")
    parser.add_argument("--json", action="store_true", help="Write JSON.")


def run(namespace: argparse.Namespace) -> int:
    """Run the checks and write the report; returns 0 if nothing failed, else 1."""
    from dovetail.core.conformance.certify import certify, plan_checks
    from dovetail.core.conformance.report import as_json, as_text, listing
    from dovetail.core.conformance.shelf import Shelf
    from dovetail.core.conformance.subject import Subject

    progress, shelf = Progress(), Shelf()
    subject = Subject.named(_device(namespace.device), shelf)
    try:
        plan = plan_checks(
            subject,
            level=namespace.level,
            only=namespace.only,
            known_gaps=namespace.known_gaps,
            share=namespace.share,
        )
        if namespace.list:
            emit(listing(plan.checks))
            return 0
        certificate = certify(
            subject,
            plan,
            lambda done, total, name: progress.show(
                f"checking {subject.name}: {done} of {total} ({name})"
            ),
            complete=not namespace.only and namespace.share == (1, 1),
        )
    finally:
        progress.clear()
        subject.close()
        shelf.close()
    emit(as_json(certificate) if namespace.json else as_text(certificate))
    return 0 if certificate.passed else 1


def _share(text: str) -> tuple[int, int]:
    number, slash, count = text.partition("/")
    if slash and number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    raise argparse.ArgumentTypeError(f"{text!r} is no share: 2/8 is the second of eight")


def _device(name: str | None) -> str:
    """The platform's name: as given, or as the usual selection finds it."""
    from dovetail.core.plugins.selection import DEVICE_VARIABLE, select_platform

    given = (name or os.environ.get(DEVICE_VARIABLE) or "").strip().lower()
    if given and given != "auto":
        return given
    return select_platform(None, os.environ).name
