"""Beam search over shared blocks finds what a loop over full recomputations finds, bit for bit."""

from __future__ import annotations

import random

import pytest

from dovetail.core.batch import Batch
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request
from tests.core.scheduler.beam_cases import (
    Outcome,
    beam_engine,
    beam_request,
    greedy,
    greedy_request,
    plain,
    reference,
    search,
)

PROMPT = list(range(10, 23))


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("width", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 3.0])
def test_the_outcome_is_the_references(steps_ahead: int, width: int, length_penalty: float) -> None:
    requests = [
        beam_request(i, PROMPT[: 3 + i], width, 12, length_penalty=length_penalty)
        for i in range(1, 6)
    ]
    outcomes, _ = search(beam_engine(steps_ahead=steps_ahead), *requests)
    for request in requests:
        want = reference(request.prompt_token_ids, width, 12, length_penalty=length_penalty)
        assert outcomes[request.id] == want
    reasons = {reason for outcome in outcomes.values() for *_, reason in outcome}
    assert "stop" in reasons or length_penalty > 2


@pytest.mark.parametrize("max_tokens", [1, 2, 20])
@pytest.mark.parametrize("include", [False, True])
def test_the_token_that_ends_a_text_is_kept_if_asked_for(max_tokens: int, include: bool) -> None:
    request = beam_request(1, PROMPT, 4, max_tokens, include_stop_str_in_output=include)
    outcomes, _ = search(beam_engine(), request)
    assert outcomes[1] == reference(PROMPT, 4, max_tokens, include=include)


def test_without_ends_every_text_has_full_length() -> None:
    engine = beam_engine()
    request = beam_request(1, PROMPT, 3, 9)
    request = type(request)(**{**_fields(request), "stop_token_ids": []})
    outcomes, _ = search(engine, request)
    assert outcomes[1] == reference(PROMPT, 3, 9, ends=())
    assert all(len(tokens) == 9 for tokens, *_ in outcomes[1])


def _fields(request: object) -> dict[str, object]:
    return {name: getattr(request, name) for name in request.__struct_fields__}  # type: ignore[attr-defined]


@pytest.mark.parametrize("seed", range(24))
def test_any_pool_rows_budget_and_neighbours_give_the_same(seed: int) -> None:
    """Pools from barely one sequence up: preemption, forks without blocks, beams without rows."""
    rng = random.Random(seed)
    budget = rng.choice([5, 8, 17, 64])
    engine = beam_engine(
        steps_ahead=seed % 2,
        num_blocks=rng.choice([13, 16, 20, 30, 60]),
        max_num_seqs=min(budget, rng.choice([1, 2, 3, 5, 16])),
        max_num_batched_tokens=budget,
        enable_prefix_caching=rng.random() < 0.5,
        mixed_batches=rng.random() < 0.7,
        policy=rng.choice(["fcfs", "priority"]),
    )
    requests = []
    for number in range(1, 8):
        prompt = [rng.randrange(8, 50) for _ in range(rng.randrange(1, 26))]
        if rng.random() < 0.6:
            width = rng.randrange(1, 7)
            requests.append(beam_request(number, prompt, width, rng.randrange(1, 18)))
        else:
            requests.append(greedy_request(number, prompt, rng.randrange(1, 20)))
    outcomes, answers = search(engine, *requests)
    for request in requests:
        params = request.params
        if params.use_beam_search:
            want = reference(request.prompt_token_ids, params.n, params.max_tokens or 0)
            assert outcomes[request.id] == want
        else:
            assert answers[request.id] == greedy(request.prompt_token_ids, params.max_tokens or 0)


def test_a_pool_for_one_sequence_still_finds_five_beams() -> None:
    engine = beam_engine(num_blocks=9, max_num_batched_tokens=16)
    outcomes, _ = search(engine, beam_request(1, PROMPT, 5, 15))
    assert outcomes[1] == reference(PROMPT, 5, 15)
    assert engine.scheduler.stats.num_preemptions > 20


def test_a_single_row_still_finds_five_beams() -> None:
    engine = beam_engine(max_num_seqs=1)
    outcomes, _ = search(engine, beam_request(1, PROMPT, 5, 10))
    assert outcomes[1] == reference(PROMPT, 5, 10)


def _most_used(engine: EngineCore) -> int:
    pool, most = engine.scheduler.pool, 0
    while engine.has_work():
        engine.step()
        most = max(most, pool.num_usable - pool.num_free)
    return most


def test_beams_share_their_blocks() -> None:
    """64 tokens of prompt are 16 blocks: 8 beams hold them once, and a few blocks each beside."""
    engine = beam_engine(enable_prefix_caching=False, max_model_len=128)
    engine.add(beam_request(1, list(range(64)), 8, 12))
    assert _most_used(engine) <= 16 + 8 * 3 < 8 * 16
    batches: list[Batch] = engine.runner.batches  # type: ignore[attr-defined]
    assert sum(b.num_tokens for b in batches) <= 64 + 8 * 12, "nothing is computed twice"
    assert any(len(b.copies) for b in batches), "blocks that are not full are copied when written"


def test_a_step_of_a_search_takes_one_batch() -> None:
    engine = beam_engine(enable_prefix_caching=False)
    engine.add(beam_request(1, PROMPT, 6, 10, length_penalty=3.0))
    while engine.has_work():
        engine.step()
    batches: list[Batch] = engine.runner.batches  # type: ignore[attr-defined]
    assert [b.num_rows for b in batches] == [1] + [6] * 9


def test_the_search_ends_when_nothing_can_change() -> None:
    for penalty in (-3.0, -1.0, 0.0, 0.5):
        steps = []
        for seed in range(12):
            engine = beam_engine()
            prompt = [seed + 8, 9]
            request = beam_request(1, prompt, 2, 60, length_penalty=penalty)
            outcomes, _ = search(engine, request)
            assert outcomes[1] == reference(prompt, 2, 60, length_penalty=penalty)
            steps.append(engine.scheduler.stats.num_steps)
        assert max(steps) < 60


def test_an_abort_frees_everything_at_any_time() -> None:
    for steps in range(1, 14):
        for ahead in (0, 1):
            engine = beam_engine(num_blocks=14, steps_ahead=ahead)
            engine.add(beam_request(1, PROMPT, 4, 20))
            engine.add(greedy_request(2, PROMPT[:5], 8))
            for _ in range(steps):
                engine.step()
            engine.abort([1])
            while engine.has_work():
                assert all(u.id == 2 for u in engine.step())
                engine.scheduler.pool.check(engine.scheduler.held_blocks())
            assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_logits_that_are_not_finite_end_the_whole_group() -> None:
    engine = beam_engine()
    engine.runner.poison = {PROMPT[0]}  # type: ignore[attr-defined]
    engine.add(beam_request(1, PROMPT, 4, 20))
    engine.add(greedy_request(2, [30, 31], 8))
    updates = []
    while engine.has_work():
        updates += engine.step()
    (error,) = [u for u in updates if u.id == 1]
    assert error.finish_reason == "error" and "not finite" in str(error.error)
    assert [t for u in updates if u.id == 2 for t in u.token_ids] == greedy([30, 31], 8)
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


def test_a_beam_that_turns_bad_ends_the_group_and_its_blocks_are_cleaned() -> None:
    engine = beam_engine()
    engine.add(beam_request(1, PROMPT, 4, 20))
    for _ in range(5):
        engine.step()
    held = {b for s in engine.scheduler.sequences.values() for b in s.blocks}
    engine.runner.poison = {PROMPT[0]}  # type: ignore[attr-defined]
    (error,) = engine.step()
    assert error.id == 1 and error.error is not None and not engine.has_work()
    engine.runner.poison = set()  # type: ignore[attr-defined]
    batches: list[Batch] = engine.runner.batches  # type: ignore[attr-defined]
    batches.clear()
    outcomes, _ = search(engine, beam_request(2, PROMPT, 4, 6))
    assert outcomes[2] == reference(PROMPT, 4, 6)
    assert held <= {target for _, target in batches[0].copies.tolist()}, "cleaned before any use"
    assert not batches[0].context_lens.any(), "what was computed for it is not found again"


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("at", range(1, 9))
def test_a_step_that_fails_once_changes_nothing(steps_ahead: int, at: int) -> None:
    engine = beam_engine(steps_ahead=steps_ahead)
    count = {"steps": 0}

    def fail(batch: Batch) -> None:
        count["steps"] += 1
        if count["steps"] == at and batch.num_rows > 1:
            raise RuntimeError("the device hiccups")

    engine.runner.fail = fail  # type: ignore[attr-defined]
    requests = [beam_request(1, PROMPT, 4, 10), beam_request(2, PROMPT[:4], 3, 10)]
    outcomes, answers = search(engine, *requests, greedy_request(3, [20, 21], 12))
    assert outcomes[1] == reference(PROMPT, 4, 10)
    assert outcomes[2] == reference(PROMPT[:4], 3, 10)
    assert answers[3] == greedy([20, 21], 12)


def test_a_search_that_always_fails_ends_alone() -> None:
    engine = beam_engine()

    def fail(batch: Batch) -> None:
        if any(batch.num_rows and t == 44 for t in batch.token_ids.tolist()):
            raise RuntimeError("no such luck")

    engine.runner.fail = fail  # type: ignore[attr-defined]
    engine.add(beam_request(1, [44, 45], 4, 10))
    engine.add(greedy_request(2, [20, 21], 5))
    updates = []
    while engine.has_work():
        updates += engine.step()
    assert [u.id for u in updates if u.error] == [1]
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable


@pytest.mark.parametrize("seed", range(30))
def test_arrivals_aborts_and_failures_at_random(seed: int) -> None:
    rng = random.Random(1000 + seed)
    budget = rng.choice([5, 9, 64])
    engine = beam_engine(
        steps_ahead=seed % 2,
        num_blocks=rng.choice([13, 18, 30, 80]),
        max_num_seqs=min(budget, rng.choice([1, 2, 4, 16])),
        max_num_batched_tokens=budget,
        enable_prefix_caching=rng.random() < 0.6,
        mixed_batches=rng.random() < 0.7,
        policy=rng.choice(["fcfs", "priority"]),
    )

    def fail(batch: Batch) -> None:
        if batch.num_rows > 1 and rng.random() < 0.01:
            raise RuntimeError("the device hiccups")

    engine.runner.fail = fail  # type: ignore[attr-defined]
    stems = [[rng.randrange(8, 50) for _ in range(20)] for _ in range(2)]
    requests: dict[int, Request] = {}
    outcomes: dict[int, Outcome] = {}
    answers: dict[int, list[int]] = {}
    aborted: set[int] = set()
    while len(requests) < 12 or engine.has_work():
        if len(requests) < 12 and rng.random() < 0.2:
            number = len(requests) + 1
            prompt = [*rng.choice(stems)[: rng.randrange(1, 20)], rng.randrange(8, 50)]
            make = [beam_request, greedy_request][rng.random() < 0.4]
            width = [rng.randrange(1, 7)] if make is beam_request else []
            requests[number] = make(number, prompt, *width, rng.randrange(1, 16))
            engine.add(requests[number])
        if requests and rng.random() < 0.02:
            victim = rng.choice(list(requests))
            engine.abort([victim])
            aborted.add(victim)
        for update in engine.step():
            assert update.error is None and update.id in requests
            if update.beams is not None:
                outcomes[update.id] = plain(update.beams)
            answers.setdefault(update.id, []).extend(update.token_ids)
        engine.scheduler.pool.check(engine.scheduler.held_blocks())
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable
    for number, request in requests.items():
        prompt, params = request.prompt_token_ids, request.params
        if params.use_beam_search:
            want = reference(prompt, params.n, params.max_tokens or 0)
            assert outcomes.get(number, want if number in aborted else None) == want
        elif number not in aborted:
            assert answers[number] == greedy(prompt, params.max_tokens or 0)
