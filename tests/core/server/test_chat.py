"""/v1/chat/completions, without a socket."""

from __future__ import annotations

from typing import Any

import pytest

from dovetail.core.request import SamplingParams
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import CHAT, MESSAGES, chat, client_of, refused

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def conversation(engine: FakeEngine) -> dict[str, Any]:
    """What the tokenizer was last asked to lay out."""
    result: dict[str, Any] = engine.tokenizer.conversations[-1]
    return result


async def test_the_answer_has_every_field(engine: FakeEngine) -> None:
    answer = await chat(engine, max_completion_tokens=2)
    assert answer.pop("id").startswith("chatcmpl-")
    assert isinstance(answer.pop("created"), int)
    answer.pop("system_fingerprint")
    assert answer == {
        "object": "chat.completion",
        "model": "org/model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "ab", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": 22,
            "completion_tokens": 2,
            "total_tokens": 24,
            "prompt_tokens_details": {"cached_tokens": 2},
        },
    }


async def test_the_prompt_is_laid_out_without_further_special_tokens(engine: FakeEngine) -> None:
    await chat(engine, max_tokens=1)
    assert engine.calls[0]["prompt"].text == "user: hello\nassistant:"
    assert engine.calls[0]["prompt"].token_ids[0] == ord("u")
    await chat(engine, max_tokens=1, add_special_tokens=True)
    assert engine.calls[1]["prompt"].token_ids[0] == 256


async def test_the_default_is_the_rest_of_the_context() -> None:
    engine = FakeEngine(max_model_len=50)
    answer = await chat(engine)
    assert answer["usage"]["completion_tokens"] == 28
    assert engine.calls[0]["params"] == SamplingParams(temperature=0.5, top_k=7, max_tokens=28)


@pytest.mark.parametrize(
    ("given", "limit"),
    [
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 4}, 4),
    ],
)
async def test_either_name_of_the_limit(
    engine: FakeEngine, given: dict[str, Any], limit: int
) -> None:
    await chat(engine, **given)
    assert engine.calls[0]["params"].max_tokens == limit


async def test_content_in_parts_and_all_roles(engine: FakeEngine) -> None:
    messages = [
        {"role": "system", "content": "a"},
        {"role": "developer", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "name": "me"},
        {
            "role": "assistant",
            "content": None,
            "reasoning": "because",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
            ],
        },
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]
    await chat(engine, messages=messages, max_tokens=1)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}}
    assert conversation(engine)["messages"] == [
        {"role": "system", "content": "a"},
        {"role": "system", "content": [{"type": "text", "text": "b"}]},
        {"role": "user", "content": "c", "name": "me"},
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "because",
            "tool_calls": [call],
        },
        {"role": "tool", "content": "d", "tool_call_id": "1"},
    ]


async def test_a_template_that_knows_developers_gets_them(engine: FakeEngine) -> None:
    engine.tokenizer.chat_template = "{% if role == 'developer' %}"
    await chat(engine, messages=[{"role": "developer", "content": "x"}], max_tokens=1)
    assert conversation(engine)["messages"][0]["role"] == "developer"


async def test_template_fields_arrive(engine: FakeEngine) -> None:
    await chat(
        engine,
        max_tokens=1,
        tools=[TOOL],
        tool_choice="auto",
        documents=[{"title": "t", "text": "x"}],
        chat_template_kwargs={"enable_thinking": False},
        reasoning_effort="low",
    )
    assert conversation(engine) == {
        "messages": MESSAGES,
        "add_generation_prompt": True,
        "continue_final_message": False,
        "tools": [TOOL],
        "documents": [{"title": "t", "text": "x"}],
        "chat_template": None,
        "template_kwargs": {"enable_thinking": False, "reasoning_effort": "low"},
    }
    await chat(engine, max_tokens=1, continue_final_message=True, tools=[])
    assert conversation(engine)["add_generation_prompt"] is False
    assert conversation(engine)["continue_final_message"] is True
    assert conversation(engine)["tools"] is None


async def test_templates_of_the_operator_and_of_trusted_requests(engine: FakeEngine) -> None:
    async with client_of(engine, chat_template="mine") as client:
        await client.post(CHAT, json={"messages": MESSAGES})
        assert conversation(engine)["chat_template"] == "mine"
        body = {"messages": MESSAGES, "chat_template": "yours"}
        assert (await client.post(CHAT, json=body)).status_code == 400
    async with client_of(engine, trust_request_chat_template=True) as client:
        await client.post(CHAT, json=body)
        assert conversation(engine)["chat_template"] == "yours"


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("messages", [], "messages"),
        ("messages", [{"role": "user"}], "messages.0.content"),
        ("messages", [{"role": "user", "content": None}], "messages.0.content"),
        (
            "messages",
            [*MESSAGES, {"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "messages.1.content.0",
        ),
        (
            "messages",
            [{"role": "user", "content": [{"type": "text"}]}],
            "messages.0.content.0.text",
        ),
        (
            "messages",
            [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}],
            "messages.0.tool_calls.0.function.arguments",
        ),
        ("top_logprobs", 2, "top_logprobs"),
        ("max_completion_tokens", -1, "max_completion_tokens"),
        ("max_completion_tokens", 0, "max_completion_tokens"),
        ("max_tokens", 0, "max_tokens"),
        ("tool_choice", "required", "tool_choice"),
        ("tool_choice", {"type": "function", "function": {"name": "f"}}, "tool_choice"),
        ("tools", [{"type": "web"}], "tools.0"),
        ("tools", [{"type": "function", "function": {}}], "tools.0.function.name"),
        ("functions", [{}], "functions"),
        ("function_call", {"name": "f"}, "function_call"),
        (
            "response_format",
            {"type": "json_schema", "json_schema": {}},
            "response_format.json_schema.schema",
        ),
        ("response_format", {"type": "structural_tag"}, "response_format.type"),
        ("audio", {"voice": "x"}, "audio"),
        ("modalities", ["text", "audio"], "modalities"),
        ("echo", True, "echo"),
        ("thinking_token_budget", 10, "thinking_token_budget"),
        ("chat_template_kwargs", {"tokenize": True}, "chat_template_kwargs.tokenize"),
        ("chat_template_kwargs", {"messages": []}, "chat_template_kwargs.messages"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_name(
    engine: FakeEngine, field: str, value: Any, param: str
) -> None:
    error = await refused(engine, CHAT, **{field: value})
    assert error["param"] == param
    assert not engine.calls


async def test_the_number_of_top_logprobs_is_bounded(engine: FakeEngine) -> None:
    error = await refused(engine, CHAT, logprobs=True, top_logprobs=21)
    assert error["param"] == "top_logprobs" and "0 to 20" in error["message"]
    await chat(engine, top_logprobs=0, max_tokens=1)


async def test_contradictions_are_refused(engine: FakeEngine) -> None:
    both = {"add_generation_prompt": True, "continue_final_message": True}
    assert (await refused(engine, CHAT, **both))["param"] == "continue_final_message"
    streamed = {"stream": True, "prompt_logprobs": 1}
    assert (await refused(engine, CHAT, **streamed))["param"] == "prompt_logprobs"


@pytest.mark.parametrize(
    "extra",
    [
        {"tool_choice": "none"},
        {"tool_choice": None, "tools": None},
        {"modalities": ["text"]},
        {"response_format": {"type": "text"}},
        {"user": "me", "metadata": {}, "store": False, "parallel_tool_calls": False},
    ],
)
async def test_harmless_values_of_refused_fields_pass(
    engine: FakeEngine, extra: dict[str, Any]
) -> None:
    await chat(engine, max_tokens=1, **extra)


async def test_deep_free_form_fields_are_refused(engine: FakeEngine) -> None:
    deep: Any = {}
    for _ in range(70):
        deep = {"a": deep}
    tools = [{"type": "function", "function": {"name": "f", "parameters": deep}}]
    assert (await refused(engine, CHAT, tools=tools))["param"] == "tools.0"
    error = await refused(engine, CHAT, chat_template_kwargs=deep)
    assert error["param"] == "chat_template_kwargs"


async def test_more_messages_than_the_context_has_tokens() -> None:
    engine = FakeEngine(max_model_len=20)
    error = await refused(engine, CHAT, messages=MESSAGES * 21)
    assert error["code"] == "context_length_exceeded"
    assert not engine.tokenizer.conversations


async def test_a_base_model_says_what_to_do(engine: FakeEngine) -> None:
    engine.tokenizer.chat_template = None
    error = await refused(engine, CHAT)
    assert (error["param"], error["code"]) == ("messages", "no_chat_template")


async def test_logprobs(engine: FakeEngine) -> None:
    answer = await chat(engine, logprobs=True, top_logprobs=3, max_tokens=1)
    assert answer["choices"][0]["logprobs"] == {
        "content": [
            {
                "token": "a",
                "logprob": -1.0,
                "bytes": [97],
                "top_logprobs": [
                    {"token": "b", "logprob": -0.5, "bytes": [98]},
                    {"token": "a", "logprob": -1.0, "bytes": [97]},
                    {"token": "d", "logprob": -9999.0, "bytes": [100]},
                ],
            }
        ],
        "refusal": None,
    }
    plain = await chat(engine, logprobs=True, max_tokens=1)
    assert plain["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
    assert engine.calls[1]["params"].logprobs == 0


async def test_token_ids_and_prompt_logprobs_on_request(engine: FakeEngine) -> None:
    answer = await chat(engine, return_token_ids=True, prompt_logprobs=1, max_tokens=2)
    assert answer["choices"][0]["token_ids"] == [97, 98]
    assert bytes(answer["prompt_token_ids"]) == b"user: hello\nassistant:"
    assert len(answer["prompt_logprobs"]) == 22
    assert answer["prompt_logprobs"][0] is None


async def test_several_choices_and_the_role_that_the_operator_chose(engine: FakeEngine) -> None:
    async with client_of(engine, response_role="bot") as client:
        response = await client.post(CHAT, json={"messages": MESSAGES, "n": 3, "max_tokens": 1})
    choices = response.json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert choices[0]["message"]["role"] == "bot"
    assert response.json()["usage"]["completion_tokens"] == 3
