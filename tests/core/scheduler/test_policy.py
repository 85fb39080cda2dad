"""Who starts when: the order of arrival, priorities that age, bounded bypassing, fair prefill."""

import itertools
import random

import pytest

from dovetail.core.engine.core import EngineCore
from dovetail.core.scheduler.policy import WaitingQueue, rank_of
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.scheduler.settings import SchedulerConfig
from tests.core.oracle import make_engine, make_request


def config(**changes: object) -> SchedulerConfig:
    fields: dict[str, object] = {
        "num_blocks": 10,
        "block_size": 4,
        "max_model_len": 32,
        "max_num_seqs": 4,
        "max_num_batched_tokens": 32,
        "vocab_size": 100,
    }
    return SchedulerConfig(**(fields | changes))  # type: ignore[arg-type]


def start_order(engine: EngineCore) -> list[int]:
    """Ids in the order in which they first joined a row."""
    order: list[int] = []
    join = engine.scheduler.table.join

    def noted(sequence: Sequence, num_computed: int) -> object:
        if sequence.request.id not in order:
            order.append(sequence.request.id)
        return join(sequence, num_computed)

    engine.scheduler.table.join = noted  # type: ignore[method-assign, assignment]
    while engine.has_work():
        engine.step()
    return order


def trace(engine: EngineCore, arrivals: list[tuple[float, int, int]]) -> dict[int, float]:
    """Run on a virtual clock, one second a step; when each request got its first token.

    ``arrivals``: (second, priority, id), ascending.
    """
    first: dict[int, float] = {}
    pending = list(arrivals)
    for now in itertools.count():
        while pending and pending[0][0] <= now:
            at, priority, number = pending.pop(0)
            engine.add(
                make_request(
                    number, [number % 900, 9], 4, priority=priority, arrival_time=at,
                    stop_token_ids=[],
                )
            )  # fmt: skip
        if not pending and not engine.has_work():
            return first
        for update in engine.step():
            first.setdefault(update.id, now)
    raise AssertionError("unreachable")


def test_first_come_first_served() -> None:
    engine = make_engine(max_num_seqs=2)
    for number in range(1, 30):
        engine.add(make_request(number, [number, 9], 5, arrival_time=1.0))
    assert start_order(engine) == list(range(1, 30))


def test_a_request_that_lost_its_row_keeps_its_place() -> None:
    queue = WaitingQueue(rank_of(config()))
    sequences = [Sequence(make_request(number, [9], 1)) for number in (1, 2, 3)]
    for sequence in sequences:
        queue.push(sequence)
    queue.remove(sequences[0])
    assert queue.peek() is sequences[1]
    queue.push(sequences[0])
    assert queue.peek() is sequences[0]
    assert len(queue) == 3


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_is_a_sorted_list(seed: int) -> None:
    rng = random.Random(seed)
    settings = config(policy="priority", priority_ageing_seconds=rng.choice([None, 3.0]))
    rank = rank_of(settings)
    queue = WaitingQueue(rank)
    model: list[Sequence] = []
    gone: list[Sequence] = []
    for number in range(300):
        action = rng.random()
        if action < 0.5:
            request = make_request(
                number, [9], 1, priority=rng.randrange(4), arrival_time=float(number // 3)
            )
            model.append(Sequence(request))
            queue.push(model[-1])
        elif action < 0.6 and gone:
            model.append(gone.pop(rng.randrange(len(gone))))
            queue.push(model[-1])
        elif model:
            gone.append(model.pop(rng.randrange(len(model))))
            queue.remove(gone[-1])
        model.sort(key=lambda sequence: rank(sequence.request))
        assert queue.peek() is (model[0] if model else None)
        assert len(queue) == len(model)


def flood(ageing: float | None) -> float:
    """Seconds until a request of priority 5 starts under a flood of priority 0."""
    engine = make_engine(
        max_num_seqs=2, policy="priority", priority_ageing_seconds=ageing, max_preemptions=4
    )
    # One request a second, where one takes two rows for four seconds: twice what can be served.
    arrivals = [(float(t), 0, 10 + t) for t in range(400)]
    arrivals.append((5.0, 5, 1))
    return trace(engine, sorted(arrivals))[1] - 5.0


def test_an_id_that_is_used_again_does_not_bring_the_old_sequence_back() -> None:
    queue = WaitingQueue(rank_of(config()))
    old, new = (Sequence(make_request(7, [1, 2], 3)) for _ in range(2))
    queue.push(old)
    queue.remove(old)
    queue.push(new)
    assert queue.peek() is new
    assert list(queue) == [new]


def test_without_ageing_a_flood_of_urgent_requests_starves_the_others() -> None:
    assert flood(None) > 390


def test_with_ageing_the_wait_is_bounded() -> None:
    # Only those that arrive within 5 priorities times 6 seconds can pass it: 5 + 30 requests,
    # two at a time, four steps each.
    assert flood(6.0) <= (5 + 30) * 4 / 2 + 4


def test_equal_priorities_start_in_order_of_arrival_whatever_the_ageing() -> None:
    engine = make_engine(max_num_seqs=2, policy="priority", priority_ageing_seconds=2.0)
    arrivals = [(float(t), 3, 100 - t) for t in range(60)]
    first = trace(engine, arrivals)
    starts = [first[number] for _, _, number in arrivals]
    assert starts == sorted(starts)


@pytest.mark.parametrize("bound", [0, 3, 8])
@pytest.mark.parametrize("seed", range(5))
def test_a_request_without_room_is_passed_a_bounded_number_of_times(bound: int, seed: int) -> None:
    rng = random.Random(seed)
    engine = make_engine(num_blocks=33, max_num_seqs=16, max_bypasses=bound)
    for number in range(1, 120):
        length = rng.choice([3, 5, 9, 90, 110])
        prompt = [rng.randrange(8, 1000) for _ in range(length)]
        engine.add(make_request(number, prompt, rng.randrange(1, 9), stop_token_ids=[]))
    order = start_order(engine)
    assert len(order) == 119
    place = {number: index for index, number in enumerate(order)}
    passed = {n: sum(place[m] < place[n] for m in place if m > n) for n in place}
    assert max(passed.values()) <= bound
    if bound:
        assert any(passed.values()), "nobody was passed: the test shows nothing"


def test_a_giant_prompt_leaves_half_the_budget_to_those_behind_it() -> None:
    engine = make_engine(num_blocks=400, max_num_batched_tokens=16, max_model_len=512)
    engine.add(make_request(1, [9] * 400, 2))
    assert engine.step() == []
    first: dict[int, int] = {}
    for step in range(1, 60):
        if step <= 20:
            engine.add(make_request(step + 1, [10 + step, 5, 6], 1))
        for update in engine.step():
            first.setdefault(update.id, step)
    waits = [first[step + 1] - step for step in range(1, 21)]
    assert max(waits) == 0, "a short prompt starts in the step after it came"
    assert first[1] <= 2 * 400 // 16
    batches = engine.runner.batches  # type: ignore[attr-defined]
    assert batches[0].num_tokens == 16, "alone, it has the whole budget"
    assert sum(b.num_tokens == 16 for b in batches) > 20, "budget was left unused"
