from __future__ import annotations

from itertools import pairwise

from hypothesis import example, given, settings
from hypothesis import strategies as st

from dovetail.core.engine.stops import StopChecker

TEXT = st.text(alphabet="ab\U0001f642 ", max_size=24)
STOPS = st.lists(st.text(alphabet="ab\U0001f642 ", min_size=1, max_size=5), max_size=4)


def run(
    pieces: list[str], stop: list[str], include: bool, num_unarmed: int = 0
) -> tuple[str, str | None]:
    """Feed the pieces; the first ``num_unarmed`` of them do not count."""
    checker = StopChecker(stop, include)
    shown = ""
    for i, piece in enumerate(pieces):
        shown += checker.feed(piece, armed=i >= num_unarmed)
        if checker.matched is not None:
            return shown, checker.matched
    return shown + checker.flush(), checker.matched


def cut(text: str, places: list[int]) -> list[str]:
    ends = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[a:b] for a, b in pairwise(ends)] or [""]


def reference(
    text: str, stop: list[str], include: bool, num_unarmed: int
) -> tuple[str, str | None]:
    """The definition, tried at each end."""
    for end in range(num_unarmed + 1, len(text) + 1):
        found = [s for s in stop if text[:end].endswith(s)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


@settings(deadline=None)
@given(TEXT, STOPS, st.booleans(), st.lists(st.integers(0, 30), max_size=8))
@example("aab", ["aab", "ab"], False, [1, 2])
@example("aa", ["a", "aa"], False, [1])
def test_any_split_gives_the_same(
    text: str, stop: list[str], include: bool, places: list[int]
) -> None:
    expected = reference(text, stop, include, 0)
    assert run([text], stop, include) == expected
    assert run(cut(text, places), stop, include) == expected
    assert run(list(text), stop, include) == expected


@settings(deadline=None)
@given(TEXT, STOPS, st.booleans(), st.integers(0, 10))
def test_a_stop_string_counts_only_if_it_ends_late_enough(
    text: str, stop: list[str], include: bool, num_unarmed: int
) -> None:
    assert run(list(text), stop, include, num_unarmed) == reference(
        text, stop, include, num_unarmed
    )


@settings(deadline=None)
@given(TEXT, STOPS)
def test_nothing_is_held_back_without_need(text: str, stop: list[str]) -> None:
    checker = StopChecker(stop)
    shown = ""
    for end, char in enumerate(text, 1):
        shown += checker.feed(char)
        if checker.matched is not None:
            return
        held = text[len(shown) : end]
        begins = [n for n in range(1, end + 1) for s in stop if s.startswith(text[end - n : end])]
        assert len(held) == max((n for n in begins if n <= end), default=0)


def test_what_may_be_a_stop_string_is_held_back() -> None:
    checker = StopChecker(["END"])
    assert [checker.feed(piece) for piece in ("abE", "N", "x", "EN")] == ["ab", "", "ENx", ""]
    assert checker.feed("D and more") == ""
    assert (checker.matched, checker.flush()) == ("END", "")


def test_nothing_is_held_back_if_the_stop_string_is_shown() -> None:
    checker = StopChecker(["END"], include=True)
    assert [checker.feed(piece) for piece in ("abE", "N")] == ["abE", "N"]
    assert checker.feed("D and more") == "D"
    assert checker.matched == "END"


def test_without_stop_strings_all_text_passes() -> None:
    checker = StopChecker([])
    assert checker.feed("abc") == "abc"
    assert checker.flush() == ""
    assert checker.matched is None


def test_long_stop_strings_cost_little() -> None:
    checker = StopChecker(["ab" * 500 + str(i) for i in range(16)])
    total = "".join(checker.feed("ab") for _ in range(2000)) + checker.flush()
    assert total == "ab" * 2000
