"""Our own platforms, certified. DOVETAIL_CONFORMANCE=full runs every check, not only most."""

from __future__ import annotations

import os
from collections.abc import Iterator
from fnmatch import fnmatchcase

import pytest

from dovetail.core.conformance.base import Check
from dovetail.core.conformance.catalogue import GROUPS, catalogue
from dovetail.core.conformance.gaps import KnownGaps
from dovetail.core.conformance.outcome import outcome_of
from dovetail.core.conformance.shelf import Shelf
from dovetail.core.conformance.subject import Subject

PLATFORMS = ("reference", "cpu")
LEFT_OUT = (
    "attention.*.head_*.*16",
    "attention.*.block_*.*16",
    "attention.*.kv_*.*16",
    "attention.*.float16",
    "attention.*.head_[2389]?.*",
)
"""What the whole kit has besides, and what would take longest."""
UNSUPPORTED = {
    "reference": ("attention.*.deterministic.*", "features.deterministic"),
    "cpu": ("attention.sdpa.deterministic.*", "attention.reference.deterministic.*"),
}
ALL_UNSUPPORTED = (
    "attention.sdpa.alibi.*",
    "attention.*.padding.*",
    "features.tensor_parallel",
    "engine.shapes",
    "engine.memory_returned",
)


def is_full() -> bool:
    return os.environ.get("DOVETAIL_CONFORMANCE") == "full"


def chosen(check: Check) -> bool:
    return is_full() or not any(fnmatchcase(check.name, pattern) for pattern in LEFT_OUT)


@pytest.fixture(scope="module", params=PLATFORMS)
def subject(request: pytest.FixtureRequest, shelf: Shelf) -> Iterator[Subject]:
    made = Subject.named(request.param, shelf)
    yield made
    made.close()


@pytest.mark.parametrize("group", [name for name, _, _ in GROUPS])
def test_every_check(subject: Subject, group: str) -> None:
    checks = [c for c in catalogue(subject) if c.name.startswith(f"{group}.") and chosen(c)]
    outcomes = [outcome_of(subject, check, KnownGaps()) for check in checks]
    failed = [
        f"{outcome.name}: {outcome.reason}" for outcome in outcomes if outcome.status == "fail"
    ]
    assert failed == []
    expected = (*ALL_UNSUPPORTED, *UNSUPPORTED[subject.name])
    silent = [
        outcome.name
        for outcome in outcomes
        if outcome.status == "unsupported"
        and not any(fnmatchcase(outcome.name, pattern) for pattern in expected)
    ]
    assert silent == [], "a check that ran before is unsupported now"
    assert any(outcome.status == "pass" for outcome in outcomes)
