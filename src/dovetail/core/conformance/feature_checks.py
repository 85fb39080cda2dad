"""Level 3: what requests may ask for, and what the platform's features promise."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np

from dovetail.core.conformance.base import Check, expect, expect_equal, require
from dovetail.core.conformance.engine import Answer, Engine, compare
from dovetail.core.conformance.oracle import Oracle, Wish
from dovetail.core.conformance.sampler import log_softmax
from dovetail.core.conformance.shelf import GREEDY, PROMPTS, prompt_of
from dovetail.core.conformance.subject import Subject
from dovetail.core.conformance.token_checks import (
    check_alternatives,
    greedy_wishes,
    logprob_errors,
)
from dovetail.core.conformance.tolerances import LOGPROBS, NEXT_CODE
from dovetail.core.plugins.quant import make_scheme, quant_registry
from dovetail.core.request import SamplingParams

__all__ = ["RULES", "checks", "rule_wishes"]

_FEW = [17, 40, 41, 123, 300]

RULES: dict[str, dict[str, Any]] = {
    "logit_bias": {"logit_bias": {40: 6.0, 41: 6.5, 300: -100.0}},
    "allowed_token_ids": {"allowed_token_ids": _FEW},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "frequency_penalty": {"frequency_penalty": 1.5},
    "presence_penalty": {"presence_penalty": 1.5},
    "min_tokens": {"min_tokens": 16},
    "bad_words": {},
}
"""What single requests do to their logits, by name. Bad words are made from the oracle's answer.
Penalties go with few allowed tokens, so that tokens repeat."""
_FEATURES = {"bad_words"}
_NUM_TOKENS = 16


def checks(subject: Subject) -> Iterator[Check]:
    """Rules that every platform has, then features that it may have."""
    for name in RULES:
        statement = f"{name} is obeyed, for greedy and for drawn tokens."
        yield _check(name, statement, partial(_rule, name=name))
    features: dict[str, tuple[Callable[[Subject], None], str]] = {
        "structured_output": (_masks, "Only tokens that a grammar allows are chosen."),
        "prompt_logprobs": (_prompt_logprobs, "Log-probabilities of prompts are the oracle's."),
        "speculation": (_speculation, "Drafts change no token, and right ones are accepted."),
        "draft_model": (_draft_model, "A draft model proposes, and changes no token."),
        "deterministic": (_deterministic, "Company does not change a bit of a log-probability."),
        "transformers_models": (
            _transformers,
            "The transformers library's model gives the same tokens.",
        ),
        "tensor_parallel": (_tensor_parallel, "Two devices give the tokens of one."),
    }
    for name, (function, statement) in features.items():
        yield _check(name, statement, function)
    for scheme in quant_registry(subject.environ).names():
        statement = (
            f"Quantized by {scheme}, tokens have the oracle's log-probabilities, its layers too."
        )
        yield _check(f"quantization.{scheme}", statement, partial(_quantized, name=scheme))


def _check(name: str, statement: str, function: Callable[[Subject], None]) -> Check:
    return Check(name=f"features.{name}", level=3, statement=statement, function=function)


def rule_wishes(subject: Subject, name: str) -> list[Wish]:
    """A greedy and a drawing request with the rule, and a greedy one without."""
    base: dict[str, Any] = {"allowed_token_ids": _FEW} if name.endswith("penalty") else {}
    settings = base | RULES[name]
    stops: tuple[int, ...] = ()
    prompt = PROMPTS[1]
    told = subject.shelf.greedy("llama")[1].token_ids
    if name == "bad_words":
        settings["bad_words_token_ids"] = [[told[2]], [told[4], told[5]], [1, 2, told[6]]]
    if name == "min_tokens":
        stops = tuple(told[2:5])
    greedy = SamplingParams(temperature=0.0, max_tokens=_NUM_TOKENS, **settings)
    drawn = SamplingParams(temperature=1.0, top_k=20, max_tokens=_NUM_TOKENS, **settings)
    return [
        Wish(prompt=prompt, params=greedy, stop_token_ids=stops),
        Wish(prompt=prompt, params=drawn, stop_token_ids=stops, seed=77),
        Wish(prompt=prompt, params=SamplingParams(temperature=0.0, max_tokens=_NUM_TOKENS, **base)),
    ]


def _rule(subject: Subject, name: str) -> None:
    subject.needs_dtype("float32")
    if name in _FEATURES:
        subject.needs(name)
    wishes = rule_wishes(subject, name)
    want = subject.shelf.oracle("llama").tell(wishes)
    compare(wishes, subject.engine().answer(wishes), want)


def _mask(generated: int) -> Collection[int]:
    """Few tokens, others at each place."""
    return [3 + (generated * 37 + i * 101) % 380 for i in range(3)]


def _masks(subject: Subject) -> None:
    subject.needs("structured_output")
    subject.needs_dtype("float32")
    short = msgspec.structs.replace(GREEDY, max_tokens=_NUM_TOKENS)
    drawn = SamplingParams(temperature=1.0, max_tokens=_NUM_TOKENS)
    wishes = [
        Wish(prompt=PROMPTS[0], params=short, mask=_mask),
        Wish(prompt=PROMPTS[1], params=short),
        Wish(prompt=PROMPTS[2], params=drawn, mask=_mask, seed=5),
    ]
    got = subject.engine().answer(wishes)
    for number in (0, 2):
        for place, token in enumerate(got[number].token_ids):
            expect(token in _mask(place), f"token {place} is {token}, which the mask forbids")
    compare(wishes, got, subject.shelf.oracle("llama").tell(wishes))


def _prompt_logprobs(subject: Subject) -> None:
    subject.needs("prompt_logprobs")
    subject.needs_dtype("float32")
    params = msgspec.structs.replace(GREEDY, max_tokens=2, prompt_logprobs=3)
    # Not what other checks have computed: cached positions have no log-probabilities.
    prompts = [prompt_of(n, np.random.default_rng(23 + n)) for n in (5, 60)]
    wishes = [Wish(prompt=prompt, params=params) for prompt in prompts]
    got, want = subject.engine().answer(wishes), subject.shelf.oracle("llama").tell(wishes)
    compare(wishes, got, want)
    for wish, answer, told in zip(wishes, got, want, strict=True):
        known = log_softmax(told.prompt_logits)
        expect_equal("positions", len(answer.prompt_logprobs), len(wish.prompt) - 1)
        pairs = zip(answer.prompt_logprobs, known, wish.prompt[1:], strict=False)
        for said, known_V, token in pairs:
            expect_equal("the token that follows", said.token_ids[0], token)
            check_alternatives(said.token_ids, said.logprobs, said.rank, known_V, 3)


def _drafted(subject: Subject, engine: Engine) -> None:
    """Compare requests of all kinds, some of which repeat themselves; drafts must be accepted."""
    few = SamplingParams(temperature=0.0, max_tokens=32, allowed_token_ids=[50])
    drawn = SamplingParams(temperature=1.2, top_p=0.9, max_tokens=32)
    wishes = [
        *greedy_wishes()[:3],
        Wish(prompt=PROMPTS[3], params=few),
        Wish(prompt=PROMPTS[4] * 3, params=drawn, seed=9),
    ]
    compare(wishes, engine.answer(wishes), subject.shelf.oracle("llama").tell(wishes))
    stats = engine.core.stats()
    expect(stats.num_draft_tokens > 0, "nothing was drafted")
    expect(stats.num_accepted_tokens > 0, "no draft was accepted, also not where all were right")


def _speculation(subject: Subject) -> None:
    subject.needs("speculation")
    subject.needs_dtype("float32")
    config = {"method": "ngram", "num_speculative_tokens": 4, "adaptive": False}
    with subject.open("llama", speculative_config=config) as engine:
        _drafted(subject, engine)


def _draft_model(subject: Subject) -> None:
    subject.needs("draft_model")
    subject.needs_dtype("float32")
    config = {
        "method": "draft_model",
        "model": str(subject.shelf.checkpoint("llama")),
        "num_speculative_tokens": 3,
        "adaptive": False,
    }
    with subject.open("llama", speculative_config=config) as engine:
        _drafted(subject, engine)


def _deterministic(subject: Subject) -> None:
    subject.needs("deterministic")
    params = msgspec.structs.replace(GREEDY, max_tokens=12, logprobs=0)
    wishes = [Wish(prompt=prompt, params=params) for prompt in PROMPTS]
    for dtype in subject.capabilities.dtypes:
        settings = {"dtype": dtype, "deterministic": True, "enable_prefix_caching": False}
        with subject.open("llama", **settings) as engine:
            alone = [engine.answer([wish])[0] for wish in wishes]
            _expect_same_bits(engine.answer(wishes), alone)


def _expect_same_bits(together: Sequence[Answer], alone: Sequence[Answer]) -> None:
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        expect_equal(f"tokens of request {number}", other.token_ids, one.token_ids)
        said, known = ([place.logprobs[0] for place in answer.logprobs] for answer in (other, one))
        expect_equal(f"log-probabilities of request {number}", said, known)


def _transformers(subject: Subject) -> None:
    subject.needs("transformers_models")
    subject.needs_dtype("float32")
    wishes = greedy_wishes()
    with subject.open("llama", model_impl="transformers") as engine:
        compare(wishes, engine.answer(wishes), subject.shelf.greedy("llama"))


def _quantized(subject: Subject, name: str) -> None:
    """The scheme quantizes weights while they are loaded; one that cannot is unsupported.

    A last bit may move an activation to the next code, so that few tokens may be off by more.
    """
    subject.needs("quantization")
    subject.needs_dtype("float32")
    folder, model = subject.shelf.checkpoint("llama"), subject.shelf.model("llama")
    oracle = Oracle.open(folder, model, scheme=make_scheme(name, {}))
    params = msgspec.structs.replace(GREEDY, max_tokens=24, logprobs=0)
    wishes = [Wish(prompt=prompt, params=params) for prompt in PROMPTS]
    with subject.open("llama", quantization=name) as engine:
        errors = logprob_errors(oracle, wishes, engine.answer(wishes))
    half, worst = float(np.median(errors)), float(errors.max())
    limit = LOGPROBS["float32"]
    expect(half <= limit, f"half of the tokens are off by {half:.2g}; allowed are {limit:g}")
    expect(worst <= NEXT_CODE, f"a token is off by {worst:.2g}; allowed are {NEXT_CODE:g}")


def _tensor_parallel(subject: Subject) -> None:
    subject.needs("tensor_parallel")
    subject.needs_dtype("float32")
    count = len(subject.platform.device_names())
    require(count >= 2, f"there is {count} device")
    wishes = greedy_wishes()
    with subject.open("llama", tensor_parallel_size=2) as engine:
        compare(wishes, engine.answer(wishes), subject.shelf.greedy("llama"))
