"""What ``make test`` leaves to ``make thorough``: more of a kind that it has a sample of."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import pytest

__all__ = ["diagonal", "every", "thorough"]

thorough = pytest.mark.thorough


def every(step: int, cases: Iterable[Any]) -> list[Any]:
    """All cases, as ``parametrize`` takes them: the first and each ``step``-th in ``make test``."""
    return [_case(case, index % step == 0) for index, case in enumerate(cases)]


def diagonal(*axes: Iterable[Any]) -> list[Any]:
    """Every combination; in ``make test`` only so many that each value of each axis comes once."""
    values = [list(axis) for axis in axes]
    longest = max(map(len, values))
    kept = {tuple(i % len(axis) for axis in values) for i in range(longest)}
    places = itertools.product(*(range(len(axis)) for axis in values))
    return [
        _case(tuple(axis[i] for axis, i in zip(values, place, strict=True)), place in kept)
        for place in places
    ]


def _case(case: Any, often: bool) -> Any:
    marks = () if often else (thorough,)
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)
