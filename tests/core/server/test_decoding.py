"""The server's fields for choosing among completions, and for words and processors."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from dovetail.core.request import SamplingParams
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    chat,
    client_of,
    complete,
    refused,
)

PATHS = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])


async def asked(engine: FakeEngine, path: str, **body: Any) -> SamplingParams:
    """The parameters that reach the engine."""
    await (complete if path == COMPLETIONS else chat)(engine, max_tokens=3, **body)
    params: SamplingParams = engine.calls[-1]["params"]
    return params


@PATHS
async def test_words_processors_and_best_of_reach_the_engine(path: str) -> None:
    given: dict[str, Any] = {
        "n": 2,
        "best_of": 3,
        "bad_words": ["no", "never"],
        "bad_words_token_ids": [[1, 299]],
        "logits_processors": {"one": {"deep": [1, 2.5, None]}, "two": None},
    }
    engine = FakeEngine()
    params = await asked(engine, path, **given)
    defaults = engine.info.default_params
    assert params == msgspec.structs.replace(defaults, max_tokens=3, **given)


@PATHS
async def test_a_beam_search_takes_nothing_from_the_models_defaults(path: str) -> None:
    engine = FakeEngine()
    assert engine.info.default_params.temperature == 0.5
    params = await asked(
        engine, path, use_beam_search=True, n=2, best_of=4, length_penalty=0.5, ignore_eos=True
    )
    assert params == SamplingParams(
        use_beam_search=True, n=2, best_of=4, length_penalty=0.5, ignore_eos=True, max_tokens=3
    )


@PATHS
async def test_a_length_penalty_without_beams_means_nothing(path: str) -> None:
    params = await asked(FakeEngine(), path, length_penalty=0.5)
    assert params.length_penalty == 1.0


@PATHS
@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"use_beam_search": True, "stream": True, "n": 2}, "use_beam_search"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 0}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"use_beam_search": True, "top_p": 0.5}, "top_p"),
        ({"use_beam_search": True, "stop": "x"}, "stop"),
        ({"use_beam_search": True, "bad_words": ["x"]}, "bad_words"),
        ({"use_beam_search": True, "logits_processors": {"x": 1}}, "logits_processors"),
        ({"use_beam_search": True, "length_penalty": 11}, "length_penalty"),
        ({"use_beam_search": True, "n": 33}, "n"),
        ({"use_beam_search": True, "best_of": 33}, "best_of"),
        ({"use_beam_search": 1}, "use_beam_search"),
        ({"bad_words": "x"}, "bad_words"),
        ({"bad_words": [""]}, "bad_words"),
        ({"bad_words_token_ids": [[300]]}, "bad_words_token_ids"),
        ({"bad_words_token_ids": [[]]}, "bad_words_token_ids"),
        ({"logits_processors": ["x"]}, "logits_processors"),
        ({"logits_processors": {str(i): 1 for i in range(17)}}, "logits_processors"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    path: str, body: dict[str, Any], param: str
) -> None:
    engine = FakeEngine()
    error = await refused(engine, path, **body)
    assert error["param"] == param and not engine.calls


async def test_best_of_as_many_as_n_may_be_streamed() -> None:
    async with client_of(FakeEngine()) as client:
        body = {"prompt": "hi", "n": 2, "best_of": 2, "stream": True}
        assert (await client.post(COMPLETIONS, json=body)).status_code == 200


async def test_best_of_counts_for_the_bound_on_choices() -> None:
    error = await refused(FakeEngine(), COMPLETIONS, prompt=["a"] * 256, best_of=5)
    assert error["param"] == "best_of"


@pytest.mark.parametrize(("limit", "count"), [(20, 20), (5, 5), (300, 300), (300, -1)])
async def test_log_probabilities_up_to_the_engines_limit(limit: int, count: int) -> None:
    engine = FakeEngine()
    engine.info = msgspec.structs.replace(engine.info, max_logprobs=limit)
    resolved = 300 if count == -1 else count
    answer = await complete(engine, logprobs=count, max_tokens=1)
    assert engine.calls[-1]["params"].logprobs == resolved
    (top,) = answer["choices"][0]["logprobs"]["top_logprobs"]
    assert len(top) > 1
    answer = await chat(engine, logprobs=True, top_logprobs=count, max_tokens=1)
    assert engine.calls[-1]["params"].logprobs == resolved
    (position,) = answer["choices"][0]["logprobs"]["content"]
    assert len(position["top_logprobs"]) > 1
    if limit < 300:
        for path, body in (
            (COMPLETIONS, {"logprobs": limit + 1}),
            (COMPLETIONS, {"logprobs": -1}),
            (CHAT, {"logprobs": True, "top_logprobs": limit + 1, "messages": MESSAGES}),
        ):
            error = await refused(engine, path, **body)
            assert f"0 to {limit}" in error["message"]
            assert error["param"] in ("logprobs", "top_logprobs")
