"""Level 3: tokens and log-probabilities of whole models, against the oracle."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from dovetail.core.conformance.base import Check, expect, expect_equal, require
from dovetail.core.conformance.checkpoints import FAMILIES, MAX_MODEL_LEN
from dovetail.core.conformance.engine import Answer, compare
from dovetail.core.conformance.oracle import Oracle, Wish
from dovetail.core.conformance.sampler import log_softmax
from dovetail.core.conformance.shelf import GREEDY, PROMPTS, prompt_of
from dovetail.core.conformance.subject import Subject
from dovetail.core.conformance.tolerances import LOGPROBS
from dovetail.core.request import SamplingParams

__all__ = ["checks", "greedy_wishes", "logprob_errors"]

SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {"temperature": 1.3},
    "top_k": {"temperature": 1.5, "top_k": 7},
    "top_p": {"temperature": 1.5, "top_p": 0.8},
    "min_p": {"temperature": 1.5, "min_p": 0.1},
    "together": {"temperature": 2.0, "top_k": 40, "top_p": 0.9, "min_p": 0.02},
}
"""Restrictions of seeded draws."""


def checks(subject: Subject) -> Iterator[Check]:
    """Families, what the scheduler may do to a request, sampling, log-probabilities."""
    for family in FAMILIES:
        yield Check(
            name=f"tokens.{family}",
            level=3,
            statement=f"{family}: {GREEDY.max_tokens} greedy tokens are the oracle's, with prompts"
            " in pieces and requests that wait for each other.",
            function=partial(_family, family=family),
        )
    yield _check("prefix_cache", "A cached prefix changes no token.", _prefix_cache)
    yield _check("preemption", "Requests that lose their blocks go on as before.", _preemption)
    for name, settings in SAMPLING.items():
        statement = f"Seeded draws with {', '.join(settings)} are the oracle's, beside greedy rows."
        yield _check(f"sampling.{name}", statement, partial(_sampling, settings=settings))
    yield _check("logprobs.float32", "Log-probabilities and ranks are the oracle's.", _logprobs)
    for dtype in ("bfloat16", "float16"):
        yield _check(
            f"logprobs.{dtype}",
            f"In {dtype} the tokens' log-probabilities are near the oracle's.",
            partial(_half_logprobs, dtype=dtype),
        )


def _check(name: str, statement: str, function: Any) -> Check:
    return Check(name=f"tokens.{name}", level=3, statement=statement, function=function)


def greedy_wishes() -> list[Wish]:
    """The kit's prompts, greedily."""
    return [Wish(prompt=prompt, params=GREEDY) for prompt in PROMPTS]


def _family(subject: Subject, family: str) -> None:
    subject.needs_dtype("float32")
    wishes, want = greedy_wishes(), subject.shelf.greedy(family)
    if family == "llama":
        compare(wishes, subject.engine().answer(wishes), want)
        return
    with subject.open(family) as engine:
        compare(wishes, engine.answer(wishes), want)


def _prefix_cache(subject: Subject) -> None:
    subject.needs_dtype("float32")
    engine = subject.engine()
    require(engine.resolved.enable_prefix_caching, "prefixes are not cached here")
    length = 2 * engine.resolved.block_size + 3
    short = SamplingParams(temperature=0.0, max_tokens=8)
    require(length + 16 <= MAX_MODEL_LEN, f"blocks of {engine.resolved.block_size} are too large")
    random = np.random.default_rng(11)
    prefix = prompt_of(length, random)
    first = [Wish(prompt=prefix, params=short)]
    wishes = [Wish(prompt=prefix + prompt_of(n, random), params=short) for n in (1, 4, 8)]
    engine.answer(first)
    got = engine.answer(wishes)
    compare(wishes, got, subject.shelf.oracle("llama").tell(wishes))
    for answer in got:
        expect(answer.num_cached_tokens > 0, "a prefix that had been computed was not found")


def _preemption(subject: Subject) -> None:
    subject.needs_dtype("float32")
    size = subject.capabilities.block_sizes[0]
    longest = max(len(prompt) for prompt in PROMPTS) + (GREEDY.max_tokens or 0)
    blocks = -(-longest // size) + 1
    with subject.open("llama", max_model_len=longest, num_gpu_blocks_override=blocks) as engine:
        wishes = greedy_wishes()
        compare(wishes, engine.answer(wishes), subject.shelf.greedy("llama"))
        expect(engine.core.stats().num_preemptions > 0, "nothing was preempted: the check is void")


def _sampling(subject: Subject, settings: dict[str, Any]) -> None:
    subject.needs_dtype("float32")
    params = SamplingParams(max_tokens=24, **settings)
    greedy = msgspec.structs.replace(GREEDY, max_tokens=24)
    wishes = [
        Wish(prompt=prompt, params=greedy if number == 2 else params, seed=1000 + number)
        for number, prompt in enumerate(PROMPTS)
    ]
    engine, oracle = subject.engine(), subject.shelf.oracle("llama")
    compare(wishes, engine.answer(wishes), oracle.tell(wishes))
    other = [msgspec.structs.replace(params, max_tokens=8)]
    again = [Wish(prompt=PROMPTS[1], params=other[0], seed=seed) for seed in range(4)]
    got = engine.answer(again)
    compare(again, got, oracle.tell(again))
    expect(len({tuple(a.token_ids) for a in got}) > 1, "four seeds gave the same tokens")


def _logprobs(subject: Subject) -> None:
    subject.needs_dtype("float32")
    params = msgspec.structs.replace(GREEDY, max_tokens=12, logprobs=4)
    wishes = [Wish(prompt=prompt, params=params) for prompt in PROMPTS[:3]]
    got, want = subject.engine().answer(wishes), subject.shelf.oracle("llama").tell(wishes)
    compare(wishes, got, want)
    for answer, told in zip(got, want, strict=True):
        expect_equal("positions with log-probabilities", len(answer.logprobs), params.max_tokens)
        for said, known in zip(answer.logprobs, told.logprobs(), strict=True):
            check_alternatives(said.token_ids, said.logprobs, said.rank, known, 4)


def check_alternatives(
    token_ids: Sequence[int],
    logprobs: Sequence[float],
    rank: int,
    known_V: np.ndarray[Any, Any],
    count: int,
) -> None:
    """Raise unless the chosen token and ``count`` alternatives have the oracle's figures."""
    tolerance = LOGPROBS["float32"]
    expect(len(token_ids) > count, f"{len(token_ids) - 1} alternatives instead of {count}")
    for token, logprob in zip(token_ids, logprobs, strict=True):
        wanted = float(known_V[token])
        expect(
            abs(logprob - wanted) <= tolerance,
            f"token {token} has log-probability {logprob:.5f} instead of {wanted:.5f};"
            f" allowed is a difference of {tolerance:g}",
        )
    chosen = float(known_V[token_ids[0]])
    least = int((known_V > chosen + tolerance).sum()) + 1
    most = int((known_V > chosen - tolerance).sum())
    expect(least <= rank <= most, f"token {token_ids[0]} has rank {rank}, not {least} to {most}")
    best = np.sort(known_V)[::-1][:count]
    for got, wanted in zip(logprobs[1 : 1 + count], best.tolist(), strict=True):
        expect(abs(got - wanted) <= tolerance, "the alternatives are not the likeliest tokens")


def _half_logprobs(subject: Subject, dtype: str) -> None:
    subject.needs_dtype(dtype)
    params = msgspec.structs.replace(GREEDY, max_tokens=16, logprobs=0)
    wishes = [Wish(prompt=prompt, params=params) for prompt in PROMPTS]
    with subject.open("llama", dtype=dtype) as engine:
        got = engine.answer(wishes)
    worst = float(logprob_errors(subject.shelf.oracle("llama", dtype), wishes, got).max())
    expect(
        worst <= LOGPROBS[dtype],
        f"a token's log-probability is off by {worst:.3f}; allowed are {LOGPROBS[dtype]:g}",
    )


def logprob_errors(
    oracle: Oracle, wishes: Sequence[Wish], answers: Sequence[Answer]
) -> npt.NDArray[np.float64]:
    """How far each token's log-probability is from what the oracle says of the same token.

    Raises:
        CheckFailedError: An answer has too few tokens, or too many.
    """
    errors = []
    for wish, answer in zip(wishes, answers, strict=True):
        expect_equal("number of tokens", len(answer.token_ids), wish.params.max_tokens)
        known = log_softmax(oracle.logits_of([*wish.prompt, *answer.token_ids[:-1]]))
        places = np.arange(len(answer.token_ids)) + len(wish.prompt) - 1
        said = np.array([place.logprobs[0] for place in answer.logprobs])
        errors.append(np.abs(said - known[places, answer.token_ids]))
    return np.concatenate(errors)
