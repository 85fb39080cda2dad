"""What the one place that makes requests lets in, and what it makes of it."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.core.engine.api import ModelInfo
from dovetail.core.engine.intake import Intake
from dovetail.core.errors import RequestError
from dovetail.core.request import PromptTokens, Request, SamplingParams
from tests.core.server.fakes import ByteTokenizer

PROMPT = PromptTokens(text=None, token_ids=[1, 2, 3])


FEATURES = ("bad_words", "logits_processors", "prompt_logprobs")


def intake(
    max_logprobs: int = 20, *, tokenizer: bool = True, features: tuple[str, ...] = FEATURES
) -> Intake:
    info = ModelInfo(
        name="m",
        path="/m",
        vocab_size=300,
        max_model_len=100,
        eos_token_ids=[9],
        default_params=SamplingParams(),
        max_logprobs=max_logprobs,
        features=frozenset(features),
    )
    return Intake(info, ByteTokenizer() if tokenizer else None, seed=0)  # type: ignore[arg-type]


def made(params: SamplingParams, **changes: Any) -> list[Request]:
    return intake(**changes).requests(PROMPT, params)


@pytest.mark.parametrize("name", ["logprobs", "prompt_logprobs"])
def test_log_probabilities_up_to_the_limit(name: str) -> None:
    def asked(count: int, limit: int) -> int:
        (request,) = made(SamplingParams(**{name: count}), max_logprobs=limit)
        return int(getattr(request.params, name))

    assert [asked(0, 20), asked(20, 20), asked(57, 57), asked(0, 0)] == [0, 20, 57, 0]
    assert asked(-1, 300) == 300
    for count, limit in ((21, 20), (-1, 299), (1, 0), (1 << 29, 300)):
        with pytest.raises(RequestError, match=f"from 0 to {limit}") as caught:
            asked(count, limit)
        assert caught.value.param == name
    for count in (-2, 1 << 31):
        with pytest.raises(RequestError, match=name):
            SamplingParams(**{name: count})


def test_bad_words_are_tokenised_with_and_without_a_space() -> None:
    given = SamplingParams(bad_words=["no", " no", "x"], bad_words_token_ids=[[7, 8], [120]])
    (request,) = made(given)
    assert request.params.bad_words == []
    assert request.params.bad_words_token_ids == [
        [7, 8],
        [120],
        [110, 111],
        [32, 110, 111],
        [32, 120],
    ]
    assert request.params.shapes_logits


def test_bad_words_that_cannot_be_are_refused() -> None:
    with pytest.raises(RequestError, match="bad_words_token_ids") as caught:
        made(SamplingParams(bad_words=["no"]), tokenizer=False)
    assert caught.value.param == "bad_words"
    with pytest.raises(RequestError, match="token id 300") as caught:
        made(SamplingParams(bad_words_token_ids=[[1, 300]]))
    assert caught.value.param == "bad_words_token_ids"
    for wrong in ([""], [1], ["x" * 101], ["x"] * 1025, "x"):
        with pytest.raises(RequestError, match="bad_words must be"):
            SamplingParams(bad_words=wrong)  # type: ignore[arg-type]
    for ids in ([[]], [1], [[-1]], [[1] * 513]):
        with pytest.raises(RequestError, match="bad_words_token_ids must be"):
            SamplingParams(bad_words_token_ids=ids)  # type: ignore[arg-type]


def test_best_of_makes_more_requests_that_are_scored() -> None:
    requests = made(SamplingParams(n=2, best_of=5, seed=3))
    assert len({request.seed for request in requests}) == 5
    assert [request.parent for request in requests] == [None] + [requests[0].id] * 4
    assert all((r.params.n, r.params.best_of, r.params.logprobs) == (1, None, 0) for r in requests)
    plain = made(SamplingParams(n=2, seed=3))
    assert [r.seed for r in plain] == [r.seed for r in requests[:2]]
    assert all(r.params.logprobs is None for r in plain)


def test_a_beam_search_is_one_request() -> None:
    (request,) = made(SamplingParams(n=2, best_of=5, use_beam_search=True))
    assert (request.params.n, request.params.best_of) == (2, 5)
    assert request.params.logprobs is None and request.stop_token_ids == [9]


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("bad_words", SamplingParams(bad_words=["no"])),
        ("bad_words", SamplingParams(bad_words_token_ids=[[1, 2]])),
        ("logits_processors", SamplingParams(logits_processors={"x": None})),
        ("prompt_logprobs", SamplingParams(prompt_logprobs=0)),
    ],
)
def test_what_the_platform_would_not_honour_is_refused(name: str, params: SamplingParams) -> None:
    with pytest.raises(RequestError, match=f"^{name} is not available on the platform") as caught:
        made(params, features=tuple(set(FEATURES) - {name}))
    assert (caught.value.param, caught.value.code) == (name, "unsupported")
    assert made(SamplingParams(), features=())
