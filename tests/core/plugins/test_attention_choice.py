"""Choosing an attention backend: every candidate has a reason, and broken ones harm nobody."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.core.contracts.attention import AttentionNeed
from dovetail.core.errors import PluginError, SelectionError
from dovetail.core.plugins.attention import (
    BrokenBackend,
    choose_attention,
    installed_backends,
)
from tests.core.plugins.conftest import Fakes

NEED = AttentionNeed(specs=(), dtype="float32", kv_dtype="float32", block_size=16)


class Backend:
    """Answers as it is told."""

    def __init__(self, name: str, answer: Any = None) -> None:
        self.name = name
        self._answer = answer

    def refuses(self, need: AttentionNeed) -> Any:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def choose(*candidates: Any, insisted: str | None = None) -> dict[str, str]:
    choice = choose_attention(candidates, NEED, insisted=insisted)
    return {"": choice.backend.name, **choice.reasons}


def test_the_first_that_does_not_refuse_with_a_reason_for_each() -> None:
    found = choose(Backend("a", "no window"), Backend("b"), Backend("c"), Backend("d", "too old"))
    assert found == {
        "": "b",
        "a": "no window",
        "b": "first in the platform's order that serves the model",
        "c": "not needed",
        "d": "too old",
    }


def test_one_that_is_insisted_on() -> None:
    found = choose(Backend("a"), Backend("b"), insisted="b")
    assert found == {"": "b", "a": "not needed", "b": "named by the user"}
    with pytest.raises(SelectionError, match="'b' cannot serve this: too old"):
        choose(Backend("a"), Backend("b", "too old"), insisted="b")
    with pytest.raises(SelectionError, match="no attention backend 'c' here; known: a, b"):
        choose(Backend("a"), Backend("b"), insisted="c")


def test_all_refuse() -> None:
    with pytest.raises(SelectionError, match="a: too old; b: too new"):
        choose(Backend("a", "too old"), Backend("b", "too new"))


def test_one_that_fails_or_lies_when_it_is_asked_refuses() -> None:
    found = choose(Backend("a", ValueError("oops")), Backend("b", 3), Backend("c"))
    assert found["a"] == "asking it failed: ValueError: oops"
    assert found["b"] == "it answered 3, which is neither a reason nor None"
    assert found[""] == "c"


GOOD = """
class Backend:
    name = "{name}"
    def __init__(self, device):
        {init}
    def refuses(self, need): return None
    bytes_per_block = allocate = plan = attend = copy_blocks = refuses
"""


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('x')", "it cannot be imported: ImportError: x (pkg 1.2, fake_pkg:B"),
        ("Backend = 3", "it is no attention backend: it lacks refuses"),
        (GOOD.format(name="quick", init="raise ValueError('y')"), "it cannot be made: ValueError"),
        (GOOD.format(name="quick", init="import sys; sys.exit(1)"), "it called sys.exit(1)"),
        (GOOD.format(name="other", init="pass"), "it calls itself 'other' (pkg 1.2"),
    ],
)
def test_one_that_is_broken_refuses_with_its_package(
    fakes: Fakes, source: str, reason: str
) -> None:
    group = "dovetail.attention_backends.toy"
    fakes.install("pkg", source, name="quick", group=group, attribute="Backend")
    good = GOOD.format(name="fine", init="pass")
    fakes.install("sound", good, name="fine", group=group, attribute="Backend")
    fine, quick = installed_backends("toy", None, ("fine",))
    assert fine.refuses(NEED) is None
    assert isinstance(quick, BrokenBackend)
    assert reason in quick.refuses(NEED)
    with pytest.raises(PluginError, match=r"pkg 1\.2"):
        quick.allocate()
