"""Drafts, right or wrong, never change an answer: over the oracle, whose every token is checked."""

import itertools
import random

import pytest

from dovetail.core.config.speculative import SpeculativeConfig
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import SamplingParams
from dovetail.core.scheduler.scheduler import Scheduler
from dovetail.core.types import IntArray
from tests.core.oracle import EOS, expected, make_engine, make_request, run
from tests.core.scheduler.test_scheduler import prompts
from tests.thorough import every


class SometimesRight:
    """Knows the oracle; each draft is right with a probability of its own."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def propose(self, row: int, epoch: int, salt: str, known: IntArray, count: int) -> list[int]:
        drafts = expected(known.tolist(), self.rng.randrange(count + 1))
        return [t if self.rng.random() < 0.7 else self.rng.randrange(1000) for t in drafts]


def make_speculating(method: str, seed: int = 0, **changes: object) -> EngineCore:
    config = SpeculativeConfig.parse(
        {"method": method, "num_speculative_tokens": 5, "adaptive": changes.pop("adaptive", False)}
        | ({"model": "draft"} if method == "draft_model" else {})
    )
    engine = make_engine(speculation=config, **changes)
    if method == "ngram":
        engine.scheduler.speculation._proposer = SometimesRight(seed)  # type: ignore[union-attr]
    return engine


def accepted(scheduler: Scheduler) -> int:
    return scheduler.speculation.stats.num_accepted_tokens  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("method", "steps_ahead", "num_blocks", "budget"),
    every(5, itertools.product(["ngram", "draft_model"], [0, 1], [34, 65, 400], [8, 16, 200])),
)
def test_every_request_gets_its_own_tokens(
    method: str, steps_ahead: int, num_blocks: int, budget: int
) -> None:
    engine = make_speculating(
        method, steps_ahead=steps_ahead, num_blocks=num_blocks, max_num_batched_tokens=budget
    )
    requests = [make_request(i, p, 1 + i * 7 % 40) for i, p in enumerate(prompts(40, 1), 1)]
    for request in requests:
        engine.add(request)
    answers = run(engine)
    for request in requests:
        want = expected(request.prompt_token_ids, request.params.max_tokens or 0, EOS)
        assert answers[request.id] == want
    assert accepted(engine.scheduler) > 0
    if num_blocks == 34:
        assert engine.scheduler.stats.num_preemptions > 0


@pytest.mark.parametrize(
    ("method", "steps_ahead", "seed"),
    every(5, itertools.product(["ngram", "suffix", "draft_model"], [0, 1], range(8))),
)
def test_random_arrivals_aborts_and_forks(method: str, steps_ahead: int, seed: int) -> None:
    rng = random.Random(seed)
    engine = make_speculating(
        method,
        seed,
        adaptive=seed % 2 == 0,
        steps_ahead=steps_ahead,
        num_blocks=rng.choice([34, 50, 120]),
        max_num_batched_tokens=rng.choice([8, 13, 64]),
        mixed_batches=rng.random() < 0.7,
    )
    waiting = prompts(50, seed, longest=50)
    requests, answers, aborted = {}, {}, set()
    number = 0
    while waiting or engine.has_work():
        if waiting and rng.random() < 0.4:
            prompt, parent = waiting.pop(), None
            for _ in range(rng.choice([1, 1, 1, 4])):
                number += 1
                requests[number] = make_request(number, prompt, rng.randrange(1, 30), parent=parent)
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


def test_a_stop_token_among_drafts_ends_the_answer_there() -> None:
    prompt = [3, 1, 4]
    want = expected(prompt, 30)
    stop = want[7]
    engine = make_speculating("ngram")
    engine.scheduler.speculation._proposer.rng.random = lambda: 0.0  # type: ignore[union-attr]
    params = SamplingParams(temperature=0.0, max_tokens=30, stop_token_ids=[stop])
    engine.add(make_request(1, prompt, 30, params=params, stop_token_ids=[stop]))
    updates = []
    while engine.has_work():
        updates += engine.step()
    assert [t for u in updates for t in u.token_ids] == want[: want.index(stop) + 1]
    assert (updates[-1].finish_reason, updates[-1].stop_reason) == ("stop", stop)
    assert max(len(u.token_ids) for u in updates) > 1


def test_drafts_fill_steps_and_never_pass_the_end() -> None:
    engine = make_speculating("ngram", num_blocks=400)
    engine.scheduler.speculation._proposer.rng.random = lambda: 0.0  # type: ignore[union-attr]
    engine.scheduler.speculation._proposer.rng.randrange = lambda n: n - 1  # type: ignore[union-attr]
    engine.add(make_request(1, [1, 2, 3], 25, stop_token_ids=[]))
    assert run(engine)[1] == expected([1, 2, 3], 25)
    batches = engine.runner.batches  # type: ignore[attr-defined]
    assert len(batches) == 1 + 4, "24 tokens after the first, six in each step"
    assert max(int(b.sequence_lens[0]) for b in batches) == 3 + 24


def test_a_step_that_fails_with_drafts_loses_nothing() -> None:
    engine, count = make_speculating("draft_model", num_blocks=400), iter(range(100))

    def fail(batch: object) -> None:
        if next(count) in (4, 9) and batch.num_rows > 1:  # type: ignore[attr-defined]
            raise RuntimeError("the device hiccups")

    engine.runner.fail = fail  # type: ignore[attr-defined]
    made = prompts(6, 4, longest=20)
    for number, prompt in enumerate(made, 1):
        engine.add(make_request(number, prompt, 20))
    answers = run(engine)
    assert all(answers[i] == expected(p, 20, EOS) for i, p in enumerate(made, 1))
