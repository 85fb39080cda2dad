"""Whatever the scheduler does, every request gets the tokens that it would get alone."""

import random

import numpy as np
import pytest

from dovetail.core.batch import Batch
from dovetail.core.request import SamplingParams
from tests.core.oracle import EOS, expected, make_engine, make_request, run


def prompts(count: int, seed: int, longest: int = 60) -> list[list[int]]:
    """Prompts with many shared beginnings."""
    rng = random.Random(seed)
    stems = [[rng.randrange(1000) for _ in range(longest)] for _ in range(3)]
    made = []
    for _ in range(count):
        stem = rng.choice(stems)[: rng.randrange(1, longest)]
        made.append(stem + [rng.randrange(1000) for _ in range(rng.randrange(1, 6))])
    return made


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("prefix_caching", [False, True])
@pytest.mark.parametrize("num_blocks", [34, 65, 400])
@pytest.mark.parametrize("budget", [8, 16, 200])
def test_every_request_gets_its_own_tokens(
    steps_ahead: int, prefix_caching: bool, num_blocks: int, budget: int
) -> None:
    engine = make_engine(
        steps_ahead=steps_ahead,
        num_blocks=num_blocks,
        enable_prefix_caching=prefix_caching,
        max_num_batched_tokens=budget,
    )
    requests = [make_request(i, p, 1 + i * 7 % 40) for i, p in enumerate(prompts(40, 1), 1)]
    for request in requests:
        engine.add(request)
    answers = run(engine)
    for request in requests:
        want = expected(request.prompt_token_ids, request.params.max_tokens or 0, EOS)
        assert answers[request.id] == want
    if num_blocks == 34:
        assert engine.scheduler.stats.num_preemptions > 0
    if prefix_caching and num_blocks == 400:
        assert engine.scheduler.stats.prefix_cache_hits > 0


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("seed", range(12))
def test_random_arrivals_aborts_and_forks(steps_ahead: int, seed: int) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        steps_ahead=steps_ahead,
        num_blocks=rng.choice([34, 50, 120]),
        max_num_batched_tokens=rng.choice([8, 13, 64]),
        mixed_batches=rng.random() < 0.7,
        policy=rng.choice(["fcfs", "priority"]),
    )
    waiting = prompts(60, seed, longest=50)
    requests, answers, aborted = {}, {}, set()
    number = 0
    while waiting or engine.has_work():
        if waiting and rng.random() < 0.4:
            prompt, parent = waiting.pop(), None
            for _ in range(rng.choice([1, 1, 1, 4])):
                number += 1
                requests[number] = make_request(
                    number, prompt, rng.randrange(1, 30), parent=parent, priority=rng.randrange(3)
                )
                engine.add(requests[number])
                parent = parent or number
        if requests and rng.random() < 0.1:
            victim = rng.choice(list(requests))
            engine.abort([victim])
            aborted.add(victim)
        for update in engine.step():
            answers.setdefault(update.id, []).extend(update.token_ids)
        engine.scheduler.pool.check(engine.scheduler.held_blocks())
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable
    for key, request in requests.items():
        want = expected(request.prompt_token_ids, request.params.max_tokens or 0, EOS)
        got = answers.get(key, [])
        assert got == (want[: len(got)] if key in aborted else want)


def test_children_share_their_parents_prefill() -> None:
    engine = make_engine(num_blocks=400, enable_prefix_caching=False)
    prompt = list(range(30))
    engine.add(make_request(1, prompt, 8))
    for child in (2, 3, 4):
        engine.add(make_request(child, prompt, 8, parent=1))
    answers = run(engine)
    assert all(answers[i] == expected(prompt, 8, EOS) for i in (1, 2, 3, 4))
    batches: list[Batch] = engine.runner.batches  # type: ignore[attr-defined]
    assert sum(len(b.copies) for b in batches) == 3, "all but the last holder copy the tail"
    prompt_tokens = sum(int(b.query_lens[b.context_lens < 30].sum()) for b in batches)
    assert prompt_tokens == 30 + 3, "a child computes the last token of the prompt only"


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_rows_that_decode_come_longest_first(steps_ahead: int) -> None:
    engine = make_engine(num_blocks=400, max_num_batched_tokens=200, steps_ahead=steps_ahead)
    lengths = [7, 30, 12, 30, 1, 19]
    for number, length in enumerate(lengths, 1):
        engine.add(make_request(number, list(range(8, 8 + length)), 6, stop_token_ids=[]))
    answers = run(engine)
    for number, length in enumerate(lengths, 1):
        assert answers[number] == expected(list(range(8, 8 + length)), 6)
    batches: list[Batch] = engine.runner.batches  # type: ignore[attr-defined]
    decodes = [batch for batch in batches if batch.num_tokens == batch.num_rows > 1]
    assert len(decodes) > 3
    for batch in decodes:
        assert (np.diff(batch.context_lens) <= 0).all()
    assert all(np.array_equal(batch.rows, decodes[0].rows) for batch in decodes[1:4]), "no shuffle"


def test_a_long_prompt_does_not_hold_up_decode() -> None:
    engine = make_engine(max_num_batched_tokens=8, num_blocks=400)
    engine.add(make_request(1, [1, 2, 3], 60, stop_token_ids=[]))
    while not engine.step():
        pass
    engine.add(make_request(2, list(range(100)), 5))
    for _ in range(12):
        assert next(u.id for u in engine.step()) == 1, "the running request gets a token each step"


def test_a_step_that_raises_ends_only_the_request_at_fault() -> None:
    engine = make_engine()
    guilty = [666, 1, 2]

    def fail(batch: Batch) -> None:
        if 666 in batch.token_ids:
            raise RuntimeError("no such luck")

    engine.runner.fail = fail  # type: ignore[attr-defined]
    good = prompts(6, 3, longest=12)
    for number, prompt in enumerate(good, 1):
        engine.add(make_request(number, prompt, 10))
    for _ in range(3):
        engine.step()
    engine.add(make_request(100, guilty, 10))
    updates = []
    while engine.has_work():
        updates += engine.step()
    errors = [u for u in updates if u.error is not None]
    assert [u.id for u in errors] == [100]
    assert "RuntimeError" in str(errors[0].error)
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_after_a_failed_step_the_others_have_the_same_tokens() -> None:
    engine, failures = make_engine(steps_ahead=1), iter([5, 9, 10])
    state = {"at": next(failures), "count": 0}

    def fail(batch: Batch) -> None:
        state["count"] += 1
        if state["count"] == state["at"] and batch.num_rows > 1:
            state["at"] = next(failures, 0)
            raise RuntimeError("the device hiccups")

    engine.runner.fail = fail  # type: ignore[attr-defined]
    made = prompts(8, 4, longest=20)
    for number, prompt in enumerate(made, 1):
        engine.add(make_request(number, prompt, 20))
    answers = run(engine)
    assert all(answers[i] == expected(p, 20, EOS) for i, p in enumerate(made, 1))


def test_a_device_that_always_fails_is_not_a_requests_fault() -> None:
    engine = make_engine()

    def fail(batch: Batch) -> None:
        raise RuntimeError("gone")

    engine.runner.fail = fail  # type: ignore[attr-defined]
    for number in range(1, 20):
        engine.add(make_request(number, [number, 2], 4))
    with pytest.raises(RuntimeError, match="gone"):
        for _ in range(100):
            engine.step()


def test_not_finite_logits_end_one_request() -> None:
    engine = make_engine()
    engine.runner.poison = {500}  # type: ignore[attr-defined]
    for number in range(1, 7):
        engine.add(make_request(number, [number, 2, 3], 6))
    engine.add(make_request(50, [500, 2, 3, 4, 5], 6))
    updates = []
    while engine.has_work():
        updates += engine.step()
    assert [u.id for u in updates if u.error] == [50]
    assert "not finite" in str(next(u.error for u in updates if u.error))
    done = {u.id for u in updates if u.finish_reason in ("stop", "length")}
    assert done == set(range(1, 7))


def test_blocks_of_a_request_that_was_not_finite_are_cleaned() -> None:
    engine = make_engine()
    engine.runner.poison = {500}  # type: ignore[attr-defined]
    engine.add(make_request(1, [500, *range(9)], 6))
    engine.add(make_request(2, [3, 4], 6))
    run(engine)
    cleaned = {
        pair
        for b in engine.runner.batches
        for pair in map(tuple, b.copies.tolist())  # type: ignore[attr-defined]
    }
    assert {source for source, _ in cleaned} == {0}
    assert len(cleaned) == 3


def test_a_resumed_request_goes_on_where_it_was() -> None:
    engine = make_engine()
    prompt = [5, 6, 8]
    want = expected(prompt, 12, None)
    params = SamplingParams(temperature=0.0, max_tokens=12)
    engine.add(make_request(1, prompt, 12, emitted=want[:5], params=params, stop_token_ids=[]))
    assert run(engine)[1] == want[5:]


def test_sampling_noise_depends_on_seed_and_position_only() -> None:
    noise: dict[tuple[int, int], set[float]] = {}
    for budget, blocks in ((8, 34), (200, 400)):
        engine = make_engine(max_num_batched_tokens=budget, num_blocks=blocks)
        params = SamplingParams(temperature=1.0, max_tokens=20)
        for number, prompt in enumerate(prompts(12, 6), 1):
            engine.add(make_request(number, prompt, 20, params=params, stop_token_ids=[]))
        run(engine)
        for batch in engine.runner.batches:  # type: ignore[attr-defined]
            lens = batch.sequence_lens[batch.sampled]
            # Requests are told apart by the length of the prompt and the position.
            for position, generated, value in zip(
                lens.tolist(),
                batch.sampling.num_generated.tolist(),
                batch.sampling.uniform.tolist(),
                strict=True,
            ):
                noise.setdefault((position - generated, generated), set()).add(value)
    per_key = [len(values) for values in noise.values()]
    assert np.mean(per_key) < 2, "preemption or chunking changed the noise"
