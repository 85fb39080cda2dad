"""Beam search without an engine, and a fake device that gives log-probabilities for it."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import blake2b

import numpy as np

from dovetail.core.batch import Batch, LogprobArrays, StepOutput
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request, SamplingParams
from dovetail.core.scheduler.scheduler import Scheduler, SchedulerConfig
from dovetail.core.types import FloatArray, IntArray
from dovetail.core.update import Hypothesis
from tests.core.oracle import EOS

VOCAB = 50
Outcome = list[tuple[list[int], float, str]]
"""Tokens after the prompt, cumulative log-probability, finish reason; best first."""


def scores(prefix: list[int]) -> FloatArray:
    """(VOCAB,) log-probabilities of what follows a prefix; some texts end soon."""
    digest = blake2b(np.array(prefix, np.int32).tobytes(), digest_size=8).digest()
    logits = np.random.default_rng(int.from_bytes(digest, "little")).normal(size=VOCAB) * 2
    logits[EOS] += 1.0
    return (logits - np.log(np.exp(logits).sum())).astype(np.float32)


def reference(
    prompt: list[int],
    width: int,
    max_tokens: int,
    log_softmax: Callable[[list[int]], FloatArray] = scores,
    *,
    ends: tuple[int, ...] = (EOS,),
    length_penalty: float = 1.0,
    include: bool = False,
) -> Outcome:
    """vLLM's beam search, as it is written there: a loop that computes every beam from scratch."""
    live: list[tuple[list[int], float]] = [([], 0.0)]
    done: list[tuple[list[int], float, str, int]] = []
    for step in range(max_tokens):
        following = []
        for tokens, total in live:
            row = log_softmax(prompt + tokens)
            for token in np.argsort(-row, kind="stable")[: 2 * width].tolist():
                logprob = total + float(row[token])
                if token in ends:
                    shown = [*tokens, token] if include else tokens
                    done.append((shown, logprob, "stop", len(prompt) + step))
                else:
                    following.append(([*tokens, token], logprob))
        live = sorted(following, key=lambda beam: beam[1], reverse=True)[:width]
    done += [(tokens, total, "length", len(prompt) + max_tokens) for tokens, total in live]
    done.sort(key=lambda beam: beam[1] / beam[3] ** length_penalty, reverse=True)
    return [(tokens, total, reason) for tokens, total, reason, _ in done[:width]]


def plain(hypotheses: list[Hypothesis]) -> Outcome:
    """An engine's outcome in the same form."""
    return [(h.token_ids, h.cumulative_logprob, h.finish_reason) for h in hypotheses]


class BeamRunner:
    """Scores what its fake KV cache holds. ``fail`` may raise, ``poison`` marks rows as not finite.

    ``poison`` holds first tokens of prompts.
    """

    def __init__(self, num_blocks: int, block_size: int, num_rows: int) -> None:
        self.kv = np.full((num_blocks, block_size), -1, np.int64)
        self.last = np.full(num_rows, -1, np.int64)
        self.block_size = block_size
        self.batches: list[Batch] = []
        self.fail: Callable[[Batch], None] = lambda batch: None
        self.poison: set[int] = set()

    def step(self, batch: Batch) -> BeamRunner._Done:
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
        prefixes = [self._prefix(batch, i) for i in batch.sampled.tolist()]
        rows = np.array([scores(p) for p in prefixes], np.float32).reshape(-1, VOCAB)
        chosen = rows.argmax(1).astype(np.int32)
        self.last[batch.rows[batch.sampled]] = chosen
        output = StepOutput(
            token_ids=chosen[:, None],
            num_tokens=np.ones(len(chosen), np.int32),
            finite=np.array([p[0] not in self.poison for p in prefixes], np.bool_),
            logprobs=self._logprobs(rows, chosen, batch.sampling.num_logprobs),
        )
        return self._Done(output)

    def _prefix(self, batch: Batch, i: int) -> list[int]:
        length = int(batch.sequence_lens[i])
        blocks = batch.block_tables[i, : -(-length // self.block_size)]
        prefix: list[int] = self.kv[blocks].reshape(-1)[:length].tolist()
        return prefix

    def _logprobs(
        self, rows: FloatArray, chosen: IntArray, wanted: int | None
    ) -> LogprobArrays | None:
        if wanted is None:
            return None
        order = np.argsort(-rows, axis=1, kind="stable")[:, :wanted].astype(np.int32)
        ids = np.concatenate([chosen[:, None], order], axis=1)
        values = np.take_along_axis(rows, ids, axis=1)
        return LogprobArrays(token_ids=ids, logprobs=values, ranks=np.ones(len(ids), np.int32))

    def close(self) -> None:
        self.batches.clear()

    class _Done:
        def __init__(self, output: StepOutput) -> None:
            self.output = output

        def result(self) -> StepOutput:
            return self.output


def beam_engine(*, steps_ahead: int = 0, **changes: object) -> EngineCore:
    """An engine of 4 tokens a block over this runner."""
    settings: dict[str, object] = {
        "num_blocks": 200,
        "block_size": 4,
        "max_model_len": 96,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 64,
        "vocab_size": VOCAB,
    }
    config = SchedulerConfig(**(settings | changes))  # type: ignore[arg-type]
    runner = BeamRunner(config.num_blocks, config.block_size, config.max_num_seqs)
    return EngineCore(Scheduler(config), runner, steps_ahead=steps_ahead)  # type: ignore[arg-type]


def beam_request(
    number: int, prompt: list[int], width: int, max_tokens: int, **params: object
) -> Request:
    """A search that ends texts at ``EOS``."""
    fields: dict[str, object] = {"n": width, "use_beam_search": True, "max_tokens": max_tokens}
    return Request(
        id=number,
        prompt_token_ids=prompt,
        params=SamplingParams(**(fields | params)),  # type: ignore[arg-type]
        stop_token_ids=[EOS],
        seed=0,
        arrival_time=float(number),
    )


def greedy_request(number: int, prompt: list[int], max_tokens: int) -> Request:
    """An ordinary request beside the searches."""
    return Request(
        id=number,
        prompt_token_ids=prompt,
        params=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        stop_token_ids=[EOS],
        seed=0,
        arrival_time=float(number),
    )


def greedy(prompt: list[int], max_tokens: int) -> list[int]:
    """What an ordinary request must answer."""
    answer: list[int] = []
    while len(answer) < max_tokens and (not answer or answer[-1] != EOS):
        answer.append(int(scores(prompt + answer).argmax()))
    return answer


def search(
    engine: EngineCore, *requests: Request
) -> tuple[dict[int, Outcome], dict[int, list[int]]]:
    """Run to the end: outcomes of searches and tokens of the others, by id. The pool is checked."""
    outcomes: dict[int, Outcome] = {}
    answers: dict[int, list[int]] = {}
    for request in requests:
        engine.add(request)
    for _ in range(20_000):
        if not engine.has_work():
            break
        for update in engine.step():
            assert update.id > 0, "nobody outside knows single beams"
            assert update.error is None
            assert update.id not in outcomes
            if update.beams is not None:
                outcomes[update.id] = plain(update.beams)
            else:
                answers.setdefault(update.id, []).extend(update.token_ids)
        engine.scheduler.pool.check(engine.scheduler.held_blocks())
    assert not engine.has_work(), "the engine does not come to an end"
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable
    return outcomes, answers
