"""Engines over the oracle platform, small enough that everything happens to them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.contracts.runner import Pending, RunnerConfig
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request, SamplingParams
from dovetail.core.sampling.oracle import Answer, TokenRule
from dovetail.core.scheduler.invariants import check_scheduler
from dovetail.core.scheduler.scheduler import Scheduler, SchedulerConfig
from dovetail.core.structured.base import Grammars
from dovetail.platforms.oracle import OracleRunner

VOCAB = 1000
EOS = 7
RULE = TokenRule(VOCAB)


def expected(prompt: list[int], max_tokens: int, stop: int | None = None) -> list[int]:
    """What an engine must answer to a greedy request, worked out without one."""
    answer = Answer(RULE, prompt, most=max_tokens)
    for index in range(max_tokens):
        if answer.at(index) == stop:
            break
    return answer.token_ids


class WatchedRunner:
    """The platform's runner. ``fail`` may raise, and ``poison`` marks rows as not finite."""

    def __init__(self, config: RunnerConfig, num_blocks: int) -> None:
        self.oracle = OracleRunner(config)
        self.oracle.allocate(num_blocks)
        self.size = config.block_size
        self.batches: list[Batch] = []
        self.fail: Callable[[Batch], None] = lambda batch: None
        self.poison: set[int] = set()
        """First tokens of prompts whose logits are not finite."""
        self._first: dict[int, int] = {}

    def step(self, batch: Batch) -> Pending:
        self.batches.append(batch)
        if batch.num_drafts_wanted is not None:
            needed = -(-(batch.sequence_lens[batch.sampled] + batch.num_drafts_wanted) // self.size)
            tables = zip(batch.block_tables[batch.sampled].tolist(), needed.tolist(), strict=True)
            assert all(all(blocks[:count]) for blocks, count in tables), "a draft has no block"
        self.fail(batch)
        self._first |= {joined.row: int(joined.token_ids[0]) for joined in batch.joined}
        output = self.oracle.step(batch).result()
        rows = batch.rows[batch.sampled].tolist()
        output.finite[:] = [self._first[row] not in self.poison for row in rows]
        return _Done(output)

    def close(self) -> None:
        self.batches.clear()


class _Done:
    def __init__(self, output: StepOutput) -> None:
        self._output = output

    def result(self) -> StepOutput:
        return self._output


def runner_config(config: SchedulerConfig, **options: object) -> RunnerConfig:
    """What the platform is told, for a scheduler's settings."""
    return RunnerConfig(
        model_path=Path(),
        hf_config={"vocab_size": config.vocab_size},
        model_impl="native",
        load_format="dummy",
        dtype="float32",
        kv_dtype="float32",
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        options=options,
    )


def make_engine(
    *,
    steps_ahead: int = 0,
    num_blocks: int = 65,
    grammars: Grammars | None = None,
    **changes: object,
) -> EngineCore:
    """An engine over the oracle: 64 blocks of 4 tokens, unless said otherwise."""
    settings: dict[str, object] = {
        "num_blocks": num_blocks,
        "block_size": 4,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "vocab_size": VOCAB,
    }
    config = SchedulerConfig(**(settings | changes))  # type: ignore[arg-type]
    runner = WatchedRunner(runner_config(config), config.num_blocks - 1)
    scheduler = Scheduler(config, grammars)
    return EngineCore(scheduler, runner, steps_ahead=steps_ahead)  # type: ignore[arg-type]


def make_request(number: int, prompt: list[int], max_tokens: int, **changes: object) -> Request:
    """A greedy request."""
    fields: dict[str, object] = {
        "id": number,
        "prompt_token_ids": prompt,
        "params": SamplingParams(temperature=0.0, max_tokens=max_tokens),
        "stop_token_ids": [EOS],
        "seed": number,
        "arrival_time": float(number),
    }
    return Request(**(fields | changes))  # type: ignore[arg-type]


def run(engine: EngineCore, *, check: bool = True) -> dict[int, list[int]]:
    """Step until nothing is left; the tokens of each request. The pool must be whole at the end."""
    answers: dict[int, list[int]] = {}
    ended: set[int] = set()
    for _ in range(10_000):
        if not engine.has_work():
            break
        for update in engine.step():
            assert update.id not in ended, f"{update.id} goes on after its end"
            answers.setdefault(update.id, []).extend(update.token_ids)
            if update.finish_reason is not None:
                ended.add(update.id)
        if check:
            check_scheduler(engine.scheduler)
    assert not engine.has_work(), "the engine does not come to an end"
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable
    return answers
