"""/v1/completions, without a socket."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.core.request import SamplingParams
from tests.core.server.fakes import BOS, FakeEngine
from tests.core.server.harness import COMPLETIONS, client_of, complete, refused, streamed


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


async def test_the_answer_has_every_field(engine: FakeEngine) -> None:
    answer = await complete(engine, max_tokens=3)
    assert answer.pop("id").startswith("cmpl-")
    assert isinstance(answer.pop("created"), int)
    assert answer.pop("system_fingerprint").startswith("dovetail-")
    assert answer == {
        "object": "text_completion",
        "model": "org/model",
        "choices": [
            {
                "index": 0,
                "text": "abc",
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 3,
            "total_tokens": 6,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_defaults_come_from_the_model(engine: FakeEngine) -> None:
    await complete(engine)
    assert engine.calls[0]["params"] == SamplingParams(temperature=0.5, top_k=7, max_tokens=16)


async def test_every_sampling_field_arrives(engine: FakeEngine) -> None:
    given: dict[str, Any] = {
        "n": 2,
        "temperature": 0,
        "top_p": 0.9,
        "top_k": -1,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "seed": 7,
        "stop": ["x"],
        "stop_token_ids": [3],
        "include_stop_str_in_output": True,
        "ignore_eos": True,
        "max_tokens": 5,
        "min_tokens": 2,
        "logprobs": 3,
        "prompt_logprobs": 1,
        "allowed_token_ids": [1, 2],
        "skip_special_tokens": False,
        "spaces_between_special_tokens": False,
    }
    await complete(engine, **given, logit_bias={"5": -100, "6": 2.5}, priority=-4, cache_salt="s")
    call = engine.calls[0]
    assert call["params"] == SamplingParams(**given, logit_bias={5: -100.0, 6: 2.5})
    assert (call["priority"], call["cache_salt"]) == (-4, "s")


async def test_the_default_of_sixteen_gives_way_to_the_context() -> None:
    engine = FakeEngine(max_model_len=10)
    await complete(engine, prompt="123456")
    assert engine.calls[0]["params"].max_tokens == 3


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("hi", [[BOS, 104, 105]]),
        (["hi", "h"], [[BOS, 104, 105], [BOS, 104]]),
        ([104, 299], [[104, 299]]),
        ([[104], [105, 0]], [[104], [105, 0]]),
    ],
)
async def test_each_form_of_prompt(engine: FakeEngine, prompt: Any, ids: list[Any]) -> None:
    answer = await complete(engine, prompt=prompt, n=2, max_tokens=1)
    sent = sorted((call["prompt"].token_ids for call in engine.calls), key=ids.index)
    assert sent == ids
    assert [choice["index"] for choice in answer["choices"]] == list(range(2 * len(ids)))
    assert answer["usage"]["prompt_tokens"] == sum(map(len, ids))
    assert answer["usage"]["completion_tokens"] == 2 * len(ids)


async def test_prompts_run_side_by_side() -> None:
    engine = FakeEngine(step_s=0.01)
    await complete(engine, prompt=["a"] * 20, max_tokens=3)
    assert engine.most_running == 20


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", "", None),
        ("prompt", [], "prompt"),
        ("prompt", [[]], "prompt.0"),
        ("prompt", ["a", [1]], "prompt.1"),
        ("prompt", ["a", 1], "prompt.1"),
        ("prompt", [1, "a"], "prompt.1"),
        ("prompt", [[1], "a"], "prompt.1"),
        ("prompt", [-1], "prompt"),
        ("prompt", [300], "prompt"),
        ("prompt", [[1], [2**31]], "prompt.1"),
        ("prompt", [2**63], "prompt"),
        ("prompt", ["a"] * 257, "prompt"),
        ("n", 0, "n"),
        ("n", 129, "n"),
        ("n", 2**63, "n"),
        ("max_tokens", 0, "max_tokens"),
        ("max_tokens", -1, "max_tokens"),
        ("logprobs", 21, "logprobs"),
        ("logprobs", -1, "logprobs"),
        ("prompt_logprobs", 21, "prompt_logprobs"),
        ("temperature", -0.1, "temperature"),
        ("temperature", 101, "temperature"),
        ("top_p", 0, "top_p"),
        ("top_k", -2, "top_k"),
        ("min_p", 1.1, "min_p"),
        ("stop", ["x"] * 17, "stop"),
        ("stop", [""], "stop"),
        ("stop_token_ids", [-1], "stop_token_ids"),
        ("stop_token_ids", [300], "stop_token_ids"),
        ("allowed_token_ids", [300], "allowed_token_ids"),
        ("logit_bias", {"300": 1}, "logit_bias"),
        ("logit_bias", {"1": 101}, "logit_bias"),
        ("min_tokens", 17, "min_tokens"),
        ("priority", 2**40, "priority"),
        ("cache_salt", "", "cache_salt"),
        ("cache_salt", "x" * 257, "cache_salt"),
        ("truncate_prompt_tokens", 0, "truncate_prompt_tokens"),
        ("stream_options", {"include_usage": True}, "stream_options"),
        ("suffix", "end", "suffix"),
        ("response_format", "json", "response_format"),
        ("structured_outputs", {"regex": 1}, "structured_outputs"),
        ("guided_json", [], "guided_json"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    engine: FakeEngine, field: str, value: Any, param: str | None
) -> None:
    if (field, value) == ("prompt", ""):
        engine.tokenizer.encode = lambda text, **_: []
        param = "prompt"
    body = {"max_tokens": 16} | {field: value}
    error = await refused(engine, COMPLETIONS, **body)
    assert error["param"] == param
    assert len(error["message"]) < 300
    assert not engine.calls


@pytest.mark.parametrize("token_id", [0, 299])
async def test_token_ids_up_to_the_logits_width_are_allowed(
    engine: FakeEngine, token_id: int
) -> None:
    ids = {"stop_token_ids": [token_id], "allowed_token_ids": [token_id]}
    await complete(engine, prompt=[token_id], logit_bias={token_id: 1}, **ids)


@pytest.mark.parametrize("field", ["suffix", "response_format"])
async def test_harmless_values_of_refused_fields_pass(engine: FakeEngine, field: str) -> None:
    harmless: dict[str, Any] = {
        "suffix": "",
        "response_format": {"type": "text"},
    }
    await complete(engine, **{field: harmless[field]})


async def test_the_number_of_choices_in_all_is_bounded(engine: FakeEngine) -> None:
    error = await refused(engine, COMPLETIONS, prompt=["a"] * 256, n=5)
    assert error["param"] == "n"


async def test_the_cost_of_prompt_logprobs_is_bounded() -> None:
    engine = FakeEngine(max_model_len=1 << 17)
    error = await refused(engine, COMPLETIONS, prompt="a" * 60_000, prompt_logprobs=20)
    assert error["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
    ("prompt", "max_tokens"), [("x" * 94, 6), ("x" * 100, None), (["a", "x" * 200], 1)]
)
async def test_too_much_for_the_context(prompt: Any, max_tokens: int | None) -> None:
    engine = FakeEngine(max_model_len=100)
    error = await refused(engine, COMPLETIONS, prompt=prompt, max_tokens=max_tokens)
    assert error["code"] == "context_length_exceeded"
    assert error["message"].startswith("This model's maximum context length is 100 tokens.")
    assert error["param"] == "prompt"


async def test_a_hopeless_text_is_not_even_tokenised() -> None:
    engine = FakeEngine(max_model_len=100)
    engine.tokenizer.encode = None
    error = await refused(engine, COMPLETIONS, prompt="x" * 10_000)
    assert error["code"] == "context_length_exceeded"


@pytest.mark.parametrize(("keep", "ids"), [(2, [98, 99]), (-1, [97, 98, 99])])
async def test_prompts_are_truncated_from_the_left(keep: int, ids: list[int]) -> None:
    engine = FakeEngine(max_model_len=4)
    answer = await complete(
        engine, prompt="abc", truncate_prompt_tokens=keep, max_tokens=1, echo=True
    )
    assert engine.calls[0]["prompt"].token_ids == ids
    assert answer["choices"][0]["text"] == bytes(ids).decode() + "a"


async def test_echo(engine: FakeEngine) -> None:
    assert (await complete(engine, echo=True, max_tokens=2))["choices"][0]["text"] == "hiab"
    ids = await complete(engine, echo=True, max_tokens=2, prompt=[104, 256])
    assert ids["choices"][0]["text"] == "h<s>ab"


async def test_logprobs_of_the_completion(engine: FakeEngine) -> None:
    answer = await complete(engine, logprobs=3, max_tokens=2)
    assert answer["choices"][0]["logprobs"] == {
        "tokens": ["a", "b"],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [
            {"b": -0.5, "a": -1.0, "d": -9999.0},
            {"c": -0.5, "b": -1.0, "e": -9999.0},
        ],
        "text_offset": [0, 1],
    }
    none = await complete(engine, logprobs=0, max_tokens=2)
    assert none["choices"][0]["logprobs"]["top_logprobs"] == [{"a": -1.0}, {"b": -1.0}]


async def test_echo_with_logprobs_as_lm_eval_asks(engine: FakeEngine) -> None:
    answer = await complete(
        engine, prompt=[[104, 105]], echo=True, logprobs=1, max_tokens=1, temperature=0
    )
    choice = answer["choices"][0]
    assert choice["text"] == "hia"
    assert choice["logprobs"]["tokens"] == ["h", "i", "a"]
    assert choice["logprobs"]["token_logprobs"] == [None, -1.0, -1.0]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert max(choice["logprobs"]["top_logprobs"][1].values()) == -0.5
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert "prompt_logprobs" not in choice


@pytest.mark.parametrize("stream", [False, True])
async def test_scoring_without_generating(engine: FakeEngine, stream: bool) -> None:
    asked = {"prompt": [104, 105], "echo": True, "logprobs": 1, "max_tokens": 0}
    if stream:
        options = {"include_usage": True}
        first, last = await streamed(engine, COMPLETIONS, **asked, stream_options=options)
        choice, usage = first["choices"][0], last["usage"]
    else:
        answer = await complete(engine, **asked)
        choice, usage = answer["choices"][0], answer["usage"]
    assert choice["text"] == "hi"
    assert choice["logprobs"]["tokens"] == ["h", "i"]
    assert choice["finish_reason"] == "length"
    assert usage["completion_tokens"] == 0 and usage["total_tokens"] == 2


async def test_prompt_logprobs_in_vllms_form(engine: FakeEngine) -> None:
    answer = await complete(engine, prompt=[104, 105], prompt_logprobs=0, max_tokens=1)
    assert answer["choices"][0]["prompt_logprobs"] == [
        None,
        {"105": {"logprob": -1.0, "rank": 1, "decoded_token": "i"}},
    ]


async def test_token_ids_on_request(engine: FakeEngine) -> None:
    answer = await complete(
        engine, return_token_ids=True, max_tokens=2, logprobs=1, return_tokens_as_token_ids=True
    )
    choice = answer["choices"][0]
    assert choice["token_ids"] == [97, 98]
    assert choice["prompt_token_ids"] == [BOS, 104, 105]
    assert choice["logprobs"]["tokens"] == ["token_id:97", "token_id:98"]
    assert choice["logprobs"]["top_logprobs"][0] == {"token_id:98": -0.5, "token_id:97": -1.0}


async def test_without_a_tokenizer_ids_go_in_and_out(engine: FakeEngine) -> None:
    engine.tokenizer = None
    error = await refused(engine, COMPLETIONS)
    assert error["param"] == "prompt" and error["code"] == "no_tokenizer"
    answer = await complete(engine, prompt=[1, 2], logprobs=0, max_tokens=1, echo=True)
    assert answer["choices"][0]["logprobs"]["tokens"] == ["token_id:1", "token_id:2", "token_id:97"]


async def test_which_model(engine: FakeEngine) -> None:
    async with client_of(engine, served_model_names=("a", "b/c")) as client:
        for given, answered in (("b/c", "b/c"), ("a", "a"), (None, "a")):
            body = {"prompt": "x", "model": given}
            assert (await client.post(COMPLETIONS, json=body)).json()["model"] == answered
        response = await client.post(COMPLETIONS, json={"prompt": "x", "model": "m" * 10_000})
    error = response.json()["error"]
    assert response.status_code == 404
    assert (error["code"], error["type"], error["param"]) == (
        "model_not_found",
        "not_found_error",
        "model",
    )
    assert "'a', 'b/c'" in error["message"] and len(error["message"]) < 300


async def test_clients_ids_are_labels_only(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        for _ in range(2):
            body = {"prompt": "x", "request_id": "victim"}
            answer = await client.post(COMPLETIONS, json=body, headers={"x-request-id": "victim"})
            assert answer.headers["x-request-id"] == "victim"
            assert "victim" not in answer.json()["id"]
    first, second = (call["request_id"] for call in engine.calls)
    assert first != second and "victim" not in first + second
