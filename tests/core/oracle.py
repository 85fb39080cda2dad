"""A runner without a model: the next token is a hash of everything before it.

What it knows of a sequence it reads from its fake KV cache, block by block, so a lost, repeated,
crossed or stale token or block gives a wrong token.
"""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request, SamplingParams
from dovetail.core.scheduler.scheduler import Scheduler, SchedulerConfig
from dovetail.core.structured.base import Grammars

VOCAB = 1000
EOS = 7


def next_token(prefix: list[int]) -> int:
    """The token that follows a prefix."""
    digest = blake2b(np.array(prefix, np.int32).tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little") % VOCAB


def expected(prompt: list[int], max_tokens: int, stop: int | None = None) -> list[int]:
    """What an engine must answer, worked out without one."""
    answer: list[int] = []
    while len(answer) < max_tokens and (not answer or answer[-1] != stop):
        answer.append(next_token(prompt + answer))
    return answer


class OracleRunner:
    """Fills in for the device. ``fail`` may raise, and ``poison`` may mark rows as not finite."""

    def __init__(self, num_blocks: int, block_size: int, num_rows: int) -> None:
        self.kv = np.full((num_blocks, block_size), -1, np.int64)
        self.last = np.full(num_rows, -1, np.int64)
        self.block_size = block_size
        self.batches: list[Batch] = []
        self.fail: Callable[[Batch], None] = lambda batch: None
        self.poison: set[int] = set()
        """First tokens of prompts whose logits are not finite."""

    def step(self, batch: Batch) -> OracleRunner._Done:
        self.batches.append(batch)
        self.fail(batch)
        for source, target in batch.copies.tolist():
            self.kv[target] = self.kv[source]
        tokens = batch.token_ids.astype(np.int64)
        tokens[batch.carried] = self.last[batch.carried_rows]
        slots = batch.slots(self.block_size)
        assert len(set(slots.tolist())) == len(slots), "two tokens are written to one slot"
        assert (slots >= self.block_size).all(), "block 0 is written"
        self.kv.reshape(-1)[slots] = tokens
        out, finite = [], []
        for i in batch.sampled.tolist():
            length = int(batch.sequence_lens[i])
            blocks = batch.block_tables[i, : -(-length // self.block_size)]
            prefix = self.kv[blocks].reshape(-1)[:length].tolist()
            out.append(next_token(prefix))
            finite.append(prefix[0] not in self.poison)
            self.last[batch.rows[i]] = out[-1]
        return self._Done(
            StepOutput(
                token_ids=np.array(out, np.int32).reshape(-1, 1),
                num_tokens=np.ones(len(out), np.int32),
                finite=np.array(finite, np.bool_),
            )
        )

    def close(self) -> None:
        self.batches.clear()

    class _Done:
        def __init__(self, output: StepOutput) -> None:
            self.output = output

        def result(self) -> StepOutput:
            return self.output


def make_engine(
    *,
    steps_ahead: int = 0,
    num_blocks: int = 65,
    grammars: Grammars | None = None,
    **changes: object,
) -> EngineCore:
    """An engine over the oracle, small enough that everything happens: 16 tokens of 4 a block."""
    settings: dict[str, object] = {
        "num_blocks": num_blocks,
        "block_size": 4,
        "max_model_len": 128,
        "max_num_seqs": 8,
        "max_num_batched_tokens": 32,
        "vocab_size": VOCAB,
    }
    config = SchedulerConfig(**(settings | changes))  # type: ignore[arg-type]
    runner = OracleRunner(config.num_blocks, config.block_size, config.max_num_seqs)
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
            engine.scheduler.pool.check(engine.scheduler.held_blocks())
    assert not engine.has_work(), "the engine does not come to an end"
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable
    return answers
