"""The gate: exact counts, and a wait that is worked out from what the queue did before."""

import pytest

from dovetail.core.engine.api import EngineStats
from dovetail.core.engine.gate import Gate
from dovetail.core.errors import OverloadedError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def gate(max_requests: int | None = None, max_tokens: int | None = None) -> tuple[Gate, Clock]:
    clock = Clock()
    made = Gate(max_requests, max_tokens, clock)
    made.max_rows = 4
    return made, clock


def entered(gate: Gate, num_sequences: int = 1) -> int:
    """How many requests get in at once, without a word from the engine in between."""
    count = 0
    while gate.refusal(count * num_sequences, num_sequences, 10) is None and count < 100:
        count += 1
        gate.enter(10)
    return count


@pytest.mark.parametrize(("limit", "num_sequences", "want"), [(0, 1, 4), (3, 1, 7), (3, 2, 3)])
def test_a_burst_fills_the_rows_and_the_queue_and_no_more(
    limit: int, num_sequences: int, want: int
) -> None:
    assert entered(gate(limit)[0], num_sequences) == want


def test_without_limits_everybody_enters() -> None:
    assert entered(gate()[0]) == 100


def test_rows_that_cannot_be_used_are_not_counted_on() -> None:
    closed, _ = gate(3)
    closed.report(EngineStats(num_running=2, num_waiting=1))
    assert closed.refusal(4, 1, 10) is None
    assert closed.refusal(5, 1, 10) == "3 requests wait already, of 3 at most"


def test_a_request_of_any_size_enters_where_nobody_is() -> None:
    closed, _ = gate(2, 50)
    assert closed.refusal(0, 100, 1000) is None
    closed.enter(1000)
    assert closed.refusal(100, 1, 1) is not None


def test_tokens_wait_until_the_first_token_or_the_end() -> None:
    closed, _ = gate(None, 50)
    closed.enter(30)
    assert closed.refusal(1, 1, 20) is None
    closed.enter(20)
    assert closed.refusal(2, 1, 1) == "50 prompt tokens wait already, of 50 at most"
    closed.start(30)
    assert closed.refusal(2, 1, 30) is None
    closed.leave(20)
    assert closed.num_tokens == 0


def test_retry_after_is_the_queue_by_its_speed() -> None:
    closed, clock = gate(0)
    closed.report(EngineStats(num_running=1, num_waiting=1))
    for _ in range(20):
        closed.enter(100)
    # One prompt of 100 tokens a second; nine remain.
    for _ in range(11):
        clock.now += 1.0
        closed.start(100)
    assert closed.retry_after() == pytest.approx(9, abs=1)
    with pytest.raises(OverloadedError, match=r"Try again in \d+ s") as caught:
        closed.check(20, 1, 100)
    assert caught.value.retry_after == closed.retry_after()
    assert caught.value.status == 429


def test_idle_time_does_not_make_the_queue_look_slow() -> None:
    closed, clock = gate()
    for _ in range(10):
        closed.enter(100)
        clock.now += 0.1
        closed.start(100)
        clock.now += 500.0
    closed.enter(1000)
    assert closed.retry_after() <= 2


def test_retry_after_is_bounded_and_grows_while_nothing_moves() -> None:
    closed, clock = gate()
    assert closed.retry_after() == 1
    closed.enter(10**9)
    clock.now += 5.0
    assert 4 <= closed.retry_after() <= 6
    clock.now += 10.0
    closed.start(1)
    assert closed.retry_after() == 60
