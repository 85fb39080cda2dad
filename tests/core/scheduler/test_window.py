"""Models whose layers all have a window: blocks that left it are given back."""

import random

import numpy as np
import pytest

from dovetail.core.batch import Batch
from dovetail.core.contracts.runner import Pending
from dovetail.core.engine.core import EngineCore
from dovetail.core.kv.prefix import extend_chain, root
from dovetail.core.scheduler.scheduler import Scheduler, SchedulerConfig
from tests.core.oracle import EOS, VOCAB, WatchedRunner, expected, make_request, run, runner_config

SIZE = 4


class WindowRunner(WatchedRunner):
    """The oracle, which must be given every block that is inside the window."""

    window = 0

    def step(self, batch: Batch) -> Pending:
        for i in range(batch.num_rows):
            length, first = int(batch.sequence_lens[i]), int(batch.context_lens[i])
            positions = np.arange(max(0, first + 1 - self.window), length)
            assert (batch.block_tables[i, positions // SIZE] > 0).all(), "it was given back"
        return super().step(batch)


def make_engine(
    window: int, *, steps_ahead: int = 0, frees: bool = True, **changes: object
) -> EngineCore:
    settings: dict[str, object] = {
        "num_blocks": 65,
        "block_size": SIZE,
        "max_model_len": 256,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 16,
        "vocab_size": VOCAB,
        "window": window if frees else None,
    }
    config = SchedulerConfig(**(settings | changes))  # type: ignore[arg-type]
    runner = WindowRunner(runner_config(config), config.num_blocks - 1)
    runner.window = window
    return EngineCore(Scheduler(config), runner, steps_ahead=steps_ahead)  # type: ignore[arg-type]


@pytest.mark.parametrize("steps_ahead", [0, 1])
@pytest.mark.parametrize("window", [1, 4, 9, 30])
@pytest.mark.parametrize("seed", range(4))
def test_every_request_gets_its_own_tokens(steps_ahead: int, window: int, seed: int) -> None:
    rng = random.Random(seed)
    engine = make_engine(
        window,
        steps_ahead=steps_ahead,
        num_blocks=rng.choice([20, 30, 65, 300]),
        enable_prefix_caching=rng.random() < 0.7,
        max_num_batched_tokens=rng.choice([8, 16, 40]),
    )
    stems = [[rng.randrange(1000) for _ in range(200)] for _ in range(2)]
    want, number = {}, 0
    for _ in range(15):
        stem = rng.choice(stems)[: rng.randrange(1, 150)]
        prompt = stem + [rng.randrange(1000) for _ in range(rng.randrange(1, 6))]
        first = number + 1
        for _ in range(rng.choice([1, 1, 3])):
            number += 1
            max_tokens = rng.randrange(1, 80)
            parent = first if number > first else None
            engine.add(make_request(number, prompt, max_tokens, parent=parent))
            want[number] = expected(prompt, max_tokens, EOS)
    assert run(engine) == want


def peak(engine: EngineCore) -> int:
    """The most blocks that were in use at any time."""
    pool, most = engine.scheduler.pool, 0
    while engine.has_work():
        engine.step()
        most = max(most, pool.num_usable - pool.num_free)
    return most


@pytest.mark.parametrize("steps_ahead", [0, 1])
def test_the_blocks_of_one_sequence_are_bounded_by_the_window(steps_ahead: int) -> None:
    def long_run(frees: bool) -> int:
        engine = make_engine(12, steps_ahead=steps_ahead, frees=frees)
        engine.add(make_request(1, [9] * 150, 100, stop_token_ids=[]))
        return peak(engine)

    assert long_run(frees=False) >= 62
    engine = make_engine(12)
    assert long_run(frees=True) <= engine.scheduler.blocks.limit == (12 + 16) // SIZE + 2


def test_a_sequence_longer_than_the_pool_is_served() -> None:
    engine = make_engine(12, num_blocks=10)
    prompt = [random.Random(3).randrange(8, 1000) for _ in range(150)]
    engine.add(make_request(1, prompt, 100, stop_token_ids=[]))
    engine.add(make_request(2, prompt[::-1], 100, stop_token_ids=[]))
    answers = run(engine)
    assert len(answers[1]) == len(answers[2]) == 100


def test_only_the_last_window_of_a_cached_prefix_is_needed() -> None:
    engine = make_engine(12, num_blocks=30, max_num_seqs=1)
    prompt = [random.Random(4).randrange(8, 1000) for _ in range(101)]
    engine.add(make_request(1, prompt, 2, stop_token_ids=[]))
    run(engine)
    # The oldest cached blocks, those of the prompt's beginning, go to another request.
    engine.add(make_request(2, [9] * 60, 2, stop_token_ids=[]))
    run(engine)
    pool, chain = engine.scheduler.pool, _chain(prompt)
    assert pool.find(chain[0]) is None
    assert pool.find(chain[-1]) is not None
    engine.add(make_request(3, prompt, 2, stop_token_ids=[]))
    hits = engine.scheduler.stats.prefix_cache_hits
    answer = run(engine)[3]
    assert engine.scheduler.stats.prefix_cache_hits - hits == 100
    assert answer == expected(prompt, 2)


def _chain(prompt: list[int]) -> list[bytes]:
    chain: list[bytes] = []
    extend_chain(chain, root(""), np.array(prompt, np.int32), SIZE)
    return chain
