from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from dovetail.core.engine.collector import calm


@pytest.fixture(autouse=True)
def nothing_frozen() -> Iterator[None]:
    gc.unfreeze()
    yield
    gc.unfreeze()


def is_looked_at(something: object) -> bool:
    """Whether the collector does; not if it was frozen."""
    return any(found is something for found in gc.get_objects())


def test_what_is_there_is_left_alone_for_a_while() -> None:
    before = gc.get_threshold()
    with calm():
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold() != before
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == before


def test_all_is_put_back_after_an_error() -> None:
    before = gc.get_threshold()
    with pytest.raises(ValueError, match="wrong"), calm():
        raise ValueError("wrong")
    assert (gc.get_freeze_count(), gc.get_threshold()) == (0, before)


def test_what_somebody_else_froze_stays_frozen() -> None:
    theirs = ["something"]
    assert is_looked_at(theirs)
    gc.freeze()
    with calm():
        assert not is_looked_at(theirs)
    assert not is_looked_at(theirs)
