"""The kit under pytest: one test for each check of each platform."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dovetail.core.conformance.base import Check
from dovetail.core.conformance.certify import Plan, plan_checks
from dovetail.core.conformance.outcome import outcome_of
from dovetail.core.conformance.shelf import Shelf
from dovetail.core.conformance.subject import Subject
from dovetail.core.errors import DovetailError

_SHELF = pytest.StashKey[Shelf]()
_PLANS = pytest.StashKey[dict[str, tuple[Subject, Plan]]]()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """List the checks of every platform that was named."""
    plans = _plans(metafunc.config)
    if "check" in metafunc.fixturenames:
        cases = [(name, check) for name, (_, plan) in plans.items() for check in plan.checks]
        ids = [f"{name}-{check.name}" for name, check in cases]
        metafunc.parametrize(("platform", "check"), cases, ids=ids)
    elif "platform" in metafunc.fixturenames:
        metafunc.parametrize("platform", list(plans))


def _plans(config: pytest.Config) -> dict[str, tuple[Subject, Plan]]:
    """Subject and plan of each platform, made once."""
    if _PLANS in config.stash:
        return config.stash[_PLANS]
    names: list[str] = config.getoption("--platform") or []
    if not names:
        raise pytest.UsageError("name the platform to certify: --platform NAME")
    gaps = config.getoption("--known-gaps")
    shelf = config.stash[_SHELF] = Shelf()
    plans = config.stash[_PLANS] = {}
    for name in names:
        try:
            subject = Subject.named(name, shelf)
            plan = plan_checks(
                subject,
                level=config.getoption("--conformance-level"),
                known_gaps=Path(gaps) if gaps else None,
            )
        except DovetailError as error:
            raise pytest.UsageError(str(error)) from error
        plans[name] = (subject, plan)
    return plans


@pytest.fixture(scope="session", autouse=True)
def _closed(pytestconfig: pytest.Config) -> Iterator[None]:
    """Close engines and delete models at the end."""
    yield
    for subject, _ in _plans(pytestconfig).values():
        subject.close()
    pytestconfig.stash[_SHELF].close()


def test_check(pytestconfig: pytest.Config, platform: str, check: Check) -> None:
    """The platform does what the check's statement says."""
    subject, plan = _plans(pytestconfig)[platform]
    outcome = outcome_of(subject, check, plan.gaps)
    if outcome.status == "unsupported":
        pytest.skip(outcome.reason)
    if outcome.status == "gap":
        pytest.xfail(outcome.reason)
    if outcome.status == "fail":
        pytest.fail(f"{check.statement} But: {outcome.reason}", pytrace=False)


def test_known_gaps(pytestconfig: pytest.Config, platform: str) -> None:
    """Every line of the known gaps is about a check."""
    _, plan = _plans(pytestconfig)[platform]
    if plan.stale:
        pytest.fail("; ".join(f"{o.name}: {o.reason}" for o in plan.stale), pytrace=False)
