"""A pool that is far too small: everybody ends, with the right tokens, in bounded disturbance."""

import itertools
import random

import pytest

from dovetail.core.engine.core import EngineCore
from dovetail.core.scheduler.sequence import Sequence
from tests.core.oracle import expected, make_engine, make_request, run
from tests.thorough import diagonal, every

LENGTH, SIZE = 128, 4
EACH = LENGTH // SIZE


def count_preemptions(engine: EngineCore) -> dict[int, int]:
    """Filled in while the engine runs: how often each request lost its row."""
    counts: dict[int, int] = {}
    preempt = engine.scheduler._preempt

    def counted(sequence: Sequence) -> None:
        counts[sequence.request.id] = counts.get(sequence.request.id, 0) + 1
        preempt(sequence)

    engine.scheduler._preempt = counted  # type: ignore[method-assign]
    return counts


def fill(engine: EngineCore, prompt_len: int | None, count: int = 64) -> dict[int, list[int]]:
    """Add requests that all grow to the full length; the answers that they must get."""
    rng = random.Random(5)
    answers = {}
    for number in range(1, count + 1):
        length = rng.randrange(4, 100) if prompt_len is None else prompt_len
        prompt = [rng.randrange(8, 1000) for _ in range(length)]
        engine.add(make_request(number, prompt, LENGTH - length, stop_token_ids=[]))
        answers[number] = expected(prompt, LENGTH - length)
    return answers


@pytest.mark.parametrize(
    ("steps_ahead", "prompt_len", "policy"), diagonal([0, 1], [8, 60, None], ["fcfs", "priority"])
)
def test_sixty_four_of_full_length_in_a_pool_for_four(
    steps_ahead: int, prompt_len: int | None, policy: str
) -> None:
    calm = make_engine(num_blocks=4 * EACH + 1, max_num_seqs=4, max_num_batched_tokens=64)
    fill(calm, prompt_len)
    run(calm, check=False)
    assert calm.scheduler.stats.num_preemptions == 0
    engine = make_engine(
        num_blocks=4 * EACH + 1,
        max_num_seqs=64,
        max_num_batched_tokens=64,
        steps_ahead=steps_ahead,
        policy=policy,
    )
    counts = count_preemptions(engine)
    want = fill(engine, prompt_len)
    assert run(engine, check=False) == want
    assert engine.scheduler.stats.num_preemptions > 10, "the test puts no pressure on"
    assert max(counts.values()) <= engine.scheduler.config.max_preemptions
    # Steps are compared with a run in which four rows have all the blocks they can need.
    assert engine.scheduler.stats.num_steps <= calm.scheduler.stats.num_steps / 0.7


@pytest.mark.parametrize(
    ("steps_ahead", "caching", "seed"),
    every(3, itertools.product([0, 1], [False, True], range(10))),
)
def test_a_pool_of_exactly_one_sequence(steps_ahead: int, caching: bool, seed: int) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        num_blocks=EACH + 1,
        steps_ahead=steps_ahead,
        enable_prefix_caching=caching,
        max_num_batched_tokens=rng.choice([8, 32, 200]),
    )
    counts = count_preemptions(engine)
    want, number = {}, 0
    for _ in range(6):
        length = rng.choice([1, 30, LENGTH - 1, LENGTH - 2, LENGTH - 5])
        prompt = [rng.randrange(8, 1000) for _ in range(length)]
        first = number + 1
        for _ in range(rng.choice([1, 2, 4])):
            number += 1
            max_tokens = rng.randrange(1, LENGTH - length + 1)
            parent = first if number > first else None
            engine.add(make_request(number, prompt, max_tokens, stop_token_ids=[], parent=parent))
            want[number] = expected(prompt, max_tokens)
    assert run(engine) == want
    assert max(counts.values(), default=0) <= engine.scheduler.config.max_preemptions


def test_forks_of_a_prompt_that_fills_the_pool() -> None:
    engine = make_engine(num_blocks=EACH + 1, enable_prefix_caching=False)
    prompt = [8 + i for i in range(LENGTH - 1)]
    for number in (1, 2, 3):
        engine.add(make_request(number, prompt, 1, parent=1 if number > 1 else None))
    assert run(engine) == dict.fromkeys((1, 2, 3), expected(prompt, 1))


def test_a_pinned_request_is_let_in_only_if_it_can_stay() -> None:
    engine = make_engine(num_blocks=2 * EACH + 1, max_num_seqs=8)
    for number in range(1, 4):
        engine.add(make_request(number, [number, 9], LENGTH - 2, stop_token_ids=[]))
        engine.scheduler.sequences[number].num_preemptions = 4
    counts = count_preemptions(engine)
    engine.step()
    assert engine.scheduler.num_running == 2
    run(engine)
    assert not counts


def test_what_can_never_fit_fails_at_once_and_alone() -> None:
    """As after a restart with a smaller cache than the one it was validated against."""
    engine = make_engine(num_blocks=EACH // 2 + 1)
    prompt = [9] * 60
    for number, max_tokens in ((1, 4), (2, 5), (3, 100)):
        engine.add(make_request(number, prompt, max_tokens, stop_token_ids=[]))
    updates = engine.step()
    assert [update.id for update in updates] == [2, 3]
    assert {update.finish_reason for update in updates} == {"error"}
    reason = "65 tokens need 17 KV blocks of 4; there are 16, and a sequence may have 128 tokens"
    assert reason in str(updates[0].error)
    assert run(engine) == {1: expected(prompt, 4)}
