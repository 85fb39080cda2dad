"""Every check of a platform, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase

from dovetail.core.conformance import (
    attention_checks,
    collective_checks,
    contract_checks,
    engine_checks,
    feature_checks,
    op_checks,
    token_checks,
)
from dovetail.core.conformance.base import Check
from dovetail.core.conformance.subject import Subject

__all__ = ["catalogue", "chosen"]

Group = Callable[[Subject], Iterator[Check]]

GROUPS: Sequence[tuple[str, int, Group]] = (
    ("contract", 1, contract_checks.checks),
    ("ops", 2, op_checks.checks),
    ("attention", 2, attention_checks.checks),
    ("collectives", 2, collective_checks.checks),
    ("tokens", 3, token_checks.checks),
    ("features", 3, feature_checks.checks),
    ("engine", 3, engine_checks.checks),
)
"""Name, level and checks of each group."""


def catalogue(subject: Subject, level: int = 3) -> list[Check]:
    """Every check up to a level.

    Where the platform, or a part after which checks are named, cannot be had, one check that fails
    with the reason stands for a group.
    """
    found: list[Check] = []
    for name, group_level, group in GROUPS:
        if group_level > level:
            continue
        try:
            if group_level > 1:
                _ = subject.platform
            found += group(subject)
        except Exception as error:
            found.append(_unlisted(name, group_level, error))
    return found


def chosen(checks: Sequence[Check], only: Sequence[str]) -> list[Check]:
    """Those whose name fits one of the patterns, or begins with one; all if there are none."""
    if not only:
        return list(checks)
    return [
        check
        for check in checks
        if any(fnmatchcase(check.name, p) or check.name.startswith(f"{p}.") for p in only)
    ]


def _unlisted(name: str, level: int, error: Exception) -> Check:
    def fail(subject: Subject) -> None:
        raise error

    return Check(
        name=name, level=level, statement=f"The checks of {name} can be listed.", function=fail
    )
