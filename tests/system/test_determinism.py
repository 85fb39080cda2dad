"""The determinism matrix: whatever the engine does, a request gets the tokens it gets alone.

A part of it by default; ``make determinism`` (DOVETAIL_DETERMINISM=full) runs 200 prompts through
every combination.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dovetail.core.batch import Batch
from dovetail.core.demo import demo_model_path
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import SamplingParams
from dovetail.core.scheduler.scheduler import Scheduler, SchedulerConfig
from tests.checkpoints import make_checkpoint
from tests.engines import answer, make_core

FULL = os.environ.get("DOVETAIL_DETERMINISM") == "full"
NUM_PROMPTS = 200 if FULL else 16
MODELS = ["tiny, float32", "bundled, bfloat16"] if FULL else ["tiny, float32"]
RETRACT_EVERY = 3
SPECULATION: tuple[dict[str, Any] | None, ...] = (
    None,
    {"method": "ngram", "num_speculative_tokens": 4, "shortest_match": 1, "adaptive": False},
)
"""Values of ``speculative_config``."""

PARAMS = (
    SamplingParams(temperature=0.0, max_tokens=12),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=12),
    SamplingParams(temperature=1.0, top_k=20, repetition_penalty=1.2, max_tokens=9),
    SamplingParams(temperature=0.0, frequency_penalty=0.5, max_tokens=15),
)


@dataclass(frozen=True)
class Way:
    """One way through the engine."""

    chunk: int | None
    """Tokens of a step; None computes prompts whole."""
    retract: bool
    batch: int
    ahead: bool
    speculation: dict[str, Any] | None

    def settings(self) -> dict[str, Any]:
        tokens = {"enable_chunked_prefill": False} if self.chunk is None else {}
        chunk = {} if self.chunk is None else {"max_num_batched_tokens": self.chunk}
        guess = {} if self.speculation is None else {"speculative_config": self.speculation}
        return {
            "max_num_seqs": self.batch,
            "async_scheduling": self.ahead,
            **tokens,
            **chunk,
            **guess,
        }

    def __str__(self) -> str:
        return (
            f"chunk {self.chunk}, {'retracted, ' * self.retract}batch {self.batch}"
            f"{', ahead' * self.ahead}{', speculating' * (self.speculation is not None)}"
        )


def every_path() -> list[Way]:
    axes = itertools.product((None, 16, 64), (False, True), (16, 1), (False, True), SPECULATION)
    return [Way(*values) for values in axes]


def some_paths() -> list[Way]:
    """Every pair of values of two axes is in one of these."""
    every = every_path()
    wanted = {pair for path in every for pair in pairs(path)}
    chosen = []
    while wanted:
        best = max(every, key=lambda path: len(wanted & pairs(path)))
        chosen.append(best)
        wanted -= pairs(best)
    return chosen


def pairs(path: Way) -> set[tuple[Any, ...]]:
    values = [(name, str(value)) for name, value in vars(path).items()]
    return set(itertools.combinations(values, 2))


class RetractingScheduler(Scheduler):
    """Sends a running sequence back to the queue at every third step.

    A sequence goes only if it has got a token since it went last, so that all come to an end.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        super().__init__(config)
        self._calls = 0
        self._lengths: dict[int, int] = {}

    def schedule(self) -> Batch | None:
        self._calls += 1
        if self._calls % RETRACT_EVERY == 0:
            if self._under_way:
                self._calls -= 1
                return None
            self._retract()
        return super().schedule()

    def _retract(self) -> None:
        for row in self.table.order[::-1].tolist():
            sequence = self.table.at(row)
            length = int(self.table.num_known[row])
            start = self._lengths.get(sequence.request.id, sequence.num_prompt_tokens)
            if length > start:
                self._lengths[sequence.request.id] = length
                self._preempt(sequence)
                return


@dataclass(frozen=True)
class Model:
    path: Path
    dtype: str
    prompts: list[list[int]]
    tokens: list[list[int]]
    """What each prompt gets alone, with nothing cached."""

    def core(self, path: Way, **settings: Any) -> EngineCore:
        core = engine(self.path, self.dtype, **path.settings(), **settings)
        if not path.retract:
            return core
        scheduler = RetractingScheduler(core.scheduler.config)
        return EngineCore(scheduler, core.runner, steps_ahead=core.steps_ahead)


def engine(path: Path, dtype: str, **settings: Any) -> EngineCore:
    fixed = {"deterministic": True, "block_size": 16, "max_model_len": 512}
    return make_core(path, "cpu", dtype=dtype, num_gpu_blocks_override=600, **fixed, **settings)


def run(core: EngineCore, prompts: Sequence[list[int]], first_id: int = 1) -> list[list[int]]:
    params = [PARAMS[i % len(PARAMS)] for i in range(len(prompts))]
    seeds = list(range(len(prompts)))
    answers = answer(core, prompts, params, first_id=first_id, seeds=seeds)
    return [a.token_ids for a in answers]


def make_prompts(highest: int) -> Iterator[list[int]]:
    """Short and long ones; a third begins with the same 80 tokens."""
    rng = random.Random(7)
    shared = [rng.randrange(3, highest) for _ in range(80)]
    for i in range(NUM_PROMPTS):
        own = [rng.randrange(3, highest) for _ in range(rng.choice((1, 2, 15, 16, 17, 40, 130)))]
        yield [*shared, *own] if i % 3 == 0 else own


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    name, dtype = request.param.split(", ")
    path = demo_model_path()
    if name == "tiny":
        path = make_checkpoint("llama", tmp_path_factory.mktemp("tiny"))
    prompts = list(make_prompts(250))
    solo = Way(chunk=None, retract=False, batch=1, ahead=False, speculation=None)
    core = engine(path, dtype, enable_prefix_caching=False, **solo.settings())
    return Model(path, dtype, prompts, run(core, prompts))


@pytest.mark.parametrize("path", every_path() if FULL else some_paths(), ids=str)
def test_tokens_are_those_of_the_request_alone(model: Model, path: Way) -> None:
    uncached = model.core(path, enable_prefix_caching=False)
    assert run(uncached, model.prompts) == model.tokens
    core = model.core(path)
    assert run(core, model.prompts) == model.tokens, "cold"
    hits = core.scheduler.stats.prefix_cache_hits
    assert run(core, model.prompts, 1000) == model.tokens, "warm"
    assert core.scheduler.stats.prefix_cache_hits > hits
    if path.retract:
        assert core.scheduler.stats.num_preemptions > NUM_PROMPTS // 2


def test_the_part_of_the_matrix_has_every_pair() -> None:
    covered = set().union(*(pairs(path) for path in some_paths()))
    assert covered == set().union(*(pairs(path) for path in every_path()))
