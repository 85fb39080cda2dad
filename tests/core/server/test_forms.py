"""How clients ask for the form of an answer, and the calls that are made of forced answers."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from dovetail.core.constraint import StructuredOutputsParams
from dovetail.core.errors import RequestError
from dovetail.core.server.tools import CallText, ForcedCall, forced_call
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    chat,
    client_of,
    complete,
    envelope,
    refused,
    streamed,
)

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"c": {}}}},
}
CLOCK = {"type": "function", "function": {"name": "clock"}}
NAMED = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


def form_of(engine: FakeEngine) -> StructuredOutputsParams | None:
    """What the engine was asked for."""
    found: StructuredOutputsParams | None = engine.calls[-1]["params"].structured_outputs
    return found


SPELLINGS: list[tuple[dict[str, Any], StructuredOutputsParams | None]] = [
    ({}, None),
    ({"response_format": None, "structured_outputs": None, "guided_json": None}, None),
    ({"response_format": {"type": "text"}}, None),
    ({"structured_outputs": {}}, None),
    ({"response_format": {"type": "json_object"}}, StructuredOutputsParams(json_object=True)),
    (
        {"response_format": {"type": "json_object", "schema": SCHEMA}},
        StructuredOutputsParams(json=SCHEMA),
    ),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "strict": True, "schema": SCHEMA},
            }
        },
        StructuredOutputsParams(json=SCHEMA),
    ),
    ({"structured_outputs": {"json": SCHEMA}}, StructuredOutputsParams(json=SCHEMA)),
    ({"structured_outputs": {"regex": "a+"}}, StructuredOutputsParams(regex="a+")),
    ({"structured_outputs": {"choice": ["a", "b"]}}, StructuredOutputsParams(choice=["a", "b"])),
    (
        {"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
        StructuredOutputsParams(json=SCHEMA, disable_any_whitespace=True),
    ),
    ({"guided_json": SCHEMA}, StructuredOutputsParams(json=SCHEMA)),
    ({"guided_json": json.dumps(SCHEMA)}, StructuredOutputsParams(json=json.dumps(SCHEMA))),
    ({"guided_regex": "b*"}, StructuredOutputsParams(regex="b*")),
    ({"guided_choice": ["x"]}, StructuredOutputsParams(choice=["x"])),
    ({"guided_grammar": "start: A"}, StructuredOutputsParams(grammar="start: A")),
    ({"json_schema": SCHEMA}, StructuredOutputsParams(json=SCHEMA)),
    ({"grammar": 'root ::= "a"'}, StructuredOutputsParams(grammar='root ::= "a"')),
]


@pytest.mark.parametrize(("body", "form"), SPELLINGS)
async def test_every_spelling_reaches_the_engine(
    engine: FakeEngine, body: dict[str, Any], form: StructuredOutputsParams | None
) -> None:
    await complete(engine, **body)
    assert form_of(engine) == form
    await chat(engine, max_tokens=1, **body)
    assert form_of(engine) == form


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": 1}, "response_format"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "schema": 1}}, "response_format.schema"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs"),
        ({"guided_choice": "a"}, "guided_choice"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a", "guided_json": {}}, "guided_regex"),
        ({"response_format": {"type": "json_object"}, "grammar": "start: A"}, "grammar"),
        ({"guided_regex": "a" * 600_000}, "guided_regex"),
    ],
)
async def test_what_is_no_form_is_refused_by_the_clients_own_name(
    engine: FakeEngine, body: dict[str, Any], param: str
) -> None:
    for path in (COMPLETIONS, CHAT):
        error = await refused(engine, path, **body)
        assert error["param"] == param
        assert len(error["message"]) < 400
    assert not engine.calls


async def test_what_the_engine_says_of_a_form_is_put_in_the_clients_words(
    engine: FakeEngine,
) -> None:
    said = "structured_outputs.json cannot be followed: Invalid type: strin."
    engine.fail_at = {
        0: RequestError(said, param="structured_outputs.json", code="invalid_grammar")
    }
    wish = {"type": "json_schema", "json_schema": {"schema": {"type": "strin"}}}
    for stream in (False, True):
        error = await refused(engine, CHAT, response_format=wish, stream=stream)
        assert error["param"] == "response_format" and error["code"] == "invalid_grammar"
        assert error["message"] == "response_format cannot be followed: Invalid type: strin."
    error = await refused(engine, CHAT, tools=[WEATHER], tool_choice="required")
    assert error["param"] == "tools"


async def test_a_long_form_for_many_choices_is_refused(engine: FakeEngine) -> None:
    wish = {"regex": "a" * 400_000}
    await complete(engine, structured_outputs=wish, n=4, max_tokens=1)
    error = await refused(engine, COMPLETIONS, structured_outputs=wish, n=50)
    assert error["param"] == "n" and "400000 characters" in error["message"]


# Forced calls


ONE = '{"c": "Bern"}'
SEVERAL = '{"name": "weather", "arguments": {"c": "Bern"}}'


async def forced(engine: FakeEngine, **body: Any) -> dict[str, Any]:
    answer = await chat(engine, max_tokens=len(engine.text), **body)
    choice: dict[str, Any] = answer["choices"][0]
    return choice


def call_of(choice: dict[str, Any]) -> tuple[str, str]:
    (call,) = choice["message"]["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert choice["message"]["content"] is None
    return call["function"]["name"], call["function"]["arguments"]


@pytest.mark.parametrize(
    ("choice", "tools", "text", "reason"),
    [
        (NAMED, [CLOCK, WEATHER], ONE, "stop"),
        ("required", [WEATHER], ONE, "tool_calls"),
        ("required", [WEATHER, CLOCK], SEVERAL, "tool_calls"),
    ],
)
async def test_a_forced_answer_is_a_call_whole_and_streamed(
    choice: Any, tools: list[Any], text: str, reason: str
) -> None:
    engine = FakeEngine(text=text)
    engine.finish_reason = "stop"
    whole = await forced(engine, tools=tools, tool_choice=choice)
    assert call_of(whole) == ("weather", ONE)
    assert whole["finish_reason"] == reason
    chunks = await streamed(
        engine, CHAT, tools=tools, tool_choice=choice, max_tokens=len(text), n=2
    )
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        calls = [c for d in mine for c in d["delta"].get("tool_calls", [])]
        assert calls[0]["function"]["name"] == "weather" and calls[0]["id"].startswith("call_")
        assert all(set(c) == {"index", "function"} for c in calls[1:])
        assert all(set(c["function"]) == {"arguments"} for c in calls[1:])
        assert "".join(c["function"]["arguments"] for c in calls) == ONE
        assert not any(d["delta"].get("content") for d in mine)
        assert mine[-1]["finish_reason"] == reason and mine[-1]["delta"] == {}


async def test_the_form_of_a_forced_answer(engine: FakeEngine) -> None:
    await chat(engine, max_tokens=1, tools=[WEATHER, CLOCK], tool_choice=NAMED)
    form = form_of(engine)
    assert form == StructuredOutputsParams(json=WEATHER["function"]["parameters"])  # type: ignore[index]
    await chat(engine, max_tokens=1, tools=[CLOCK], tool_choice="required")
    assert json.loads(str(form_of(engine).json))["properties"] == {}  # type: ignore[union-attr]
    await chat(engine, max_tokens=1, tools=[WEATHER, CLOCK], tool_choice="required")
    grammar = str(form_of(engine).grammar)  # type: ignore[union-attr]
    assert grammar.startswith("start: call_0 | call_1\n") and "%json" in grammar


async def test_an_answer_that_was_cut_off_keeps_all_that_came() -> None:
    for cut in (3, len(SEVERAL) - 4, len(SEVERAL) - 1):
        engine = FakeEngine(text=SEVERAL)
        body = {"tools": [WEATHER, CLOCK], "tool_choice": "required", "max_tokens": cut}
        answer = await chat(engine, **body)
        choice = answer["choices"][0]
        assert choice["finish_reason"] == "length"
        if cut == 3:
            assert choice["message"]["content"] == SEVERAL[:3]
            assert "tool_calls" not in choice["message"]
        else:
            head = '{"name": "weather", "arguments": '
            assert call_of(choice) == ("weather", SEVERAL[len(head) : cut])


async def test_a_free_choice_forces_nothing(engine: FakeEngine) -> None:
    for choice in ("auto", "none", None):
        answer = await chat(engine, max_tokens=2, tools=[WEATHER], tool_choice=choice)
        assert form_of(engine) is None
        assert "tool_calls" not in answer["choices"][0]["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "tool_choice"),
        ({"tool_choice": "sometimes", "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": {"type": "function"}, "tools": [WEATHER]}, "tool_choice"),
        ({"tool_choice": NAMED, "tools": [CLOCK]}, "tool_choice"),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": 'a"b'}}],
            },
            "tools.0.function.name",
        ),
        (
            {
                "tool_choice": "required",
                "tools": [{"type": "function", "function": {"name": "a", "parameters": []}}],
            },
            "tools.0.function.parameters",
        ),
        (
            {
                "tool_choice": NAMED,
                "tools": [WEATHER],
                "response_format": {"type": "json_object"},
            },
            "tools",
        ),
    ],
)
async def test_calls_that_cannot_be_forced_are_refused(
    engine: FakeEngine, body: dict[str, Any], param: str
) -> None:
    assert (await refused(engine, CHAT, **body))["param"] == param
    assert not engine.calls


async def test_a_schema_that_is_nested_too_deeply_is_refused(engine: FakeEngine) -> None:
    deep = '{"a":' * 2000 + "1" + "}" * 2000
    tools = f'[{{"type":"function","function":{{"name":"f","parameters":{deep}}}}}]'
    for field in (
        f'"guided_json":{deep}',
        f'"response_format":{{"type":"json_object","schema":{deep}}}',
        f'"tool_choice":"required","tools":{tools}',
    ):
        body = f'{{"messages":{json.dumps(MESSAGES)},{field}}}'
        async with client_of(engine) as client:
            response: httpx.Response = await client.post(
                CHAT, content=body, headers={"content-type": "application/json"}
            )
        assert response.status_code == 400
        envelope(response)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_a_call_is_the_same_however_its_text_is_cut_up(size: int) -> None:
    call = _several()
    text = '{"name": "clock", "arguments": {"a": {"b": "}"}}}'
    parts = CallText(call)
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    got = "".join(parts.feed(p, last=i == len(pieces) - 1) for i, p in enumerate(pieces))
    assert (parts.name, got) == ("clock", '{"a": {"b": "}"}}')


def _several() -> ForcedCall:
    from dovetail.core.server.protocol import ChatCompletionRequest

    request = ChatCompletionRequest(messages=[], tools=[WEATHER, CLOCK], tool_choice="required")
    call = forced_call(request, 64)
    assert call is not None
    return call
