"""Answers of a given form over HTTP, as the official OpenAI client asks for them."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.core.structured.cases import check_json
from tests.servers import Server

MODEL = "dovetail-demo"
MESSAGES: Any = [{"role": "user", "content": "class Point:"}]
SCHEMA: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 10},
        "x": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["point", "line"]},
    },
    "required": ["name", "x", "kind"],
    "additionalProperties": False,
}
FORMAT: Any = {
    "type": "json_schema",
    "json_schema": {"name": "point", "strict": True, "schema": SCHEMA},
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "draw", "parameters": SCHEMA}},
    {
        "type": "function",
        "function": {
            "name": "erase",
            "parameters": {
                "type": "object",
                "properties": {"all": {"type": "boolean"}},
                "required": ["all"],
                "additionalProperties": False,
            },
        },
    },
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    server = Server(log, "--device", "cpu", "--dtype", "float32", "--threads", "1")
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **more: Any) -> Any:
    defaults = {"model": MODEL, "messages": MESSAGES, "max_tokens": 300, "temperature": 1.0}
    return client.chat.completions.create(**(defaults | more))


@pytest.mark.parametrize("seed", range(3))
def test_a_schema_whole_and_streamed(client: openai.OpenAI, seed: int) -> None:
    whole = ask(client, response_format=FORMAT, seed=seed).choices[0]
    assert whole.finish_reason == "stop"
    check_json(SCHEMA, whole.message.content)
    chunks = list(ask(client, response_format=FORMAT, seed=seed, stream=True))
    text = "".join(c.choices[0].delta.content or "" for c in chunks)
    assert text == whole.message.content
    assert chunks[-1].choices[0].finish_reason == "stop"


def test_several_choices(client: openai.OpenAI) -> None:
    answer = ask(client, response_format=FORMAT, n=4, seed=5)
    texts = {choice.message.content for choice in answer.choices}
    assert len(texts) == 4
    for text in texts:
        check_json(SCHEMA, text)


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"regex": "[a-z]{3}-[0-9]{2}"}, "[a-z]{3}-[0-9]{2}"),
        ({"choice": ["left", "right"]}, "left|right"),
        (
            {"grammar": 'root ::= "<" item ">"\nitem ::= [a-z]+ | "(" [0-9] ")"'},
            r"<([a-z]+|\(\d\))>",
        ),
    ],
)
def test_the_other_forms_on_completions(
    client: openai.OpenAI, form: dict[str, Any], pattern: str
) -> None:
    answer = client.completions.create(
        model=MODEL,
        prompt="def ",
        max_tokens=300,
        n=3,
        seed=1,
        extra_body={"structured_outputs": form},
    )
    assert all(re.fullmatch(pattern, choice.text) for choice in answer.choices)


def test_a_named_tool(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "draw"}}
    answer = ask(client, tools=TOOLS, tool_choice=choice).choices[0]
    (call,) = answer.message.tool_calls
    assert (call.type, call.function.name, answer.finish_reason) == ("function", "draw", "stop")
    check_json(SCHEMA, call.function.arguments)
    assert answer.message.content is None


def test_any_tool_whole_and_streamed(client: openai.OpenAI) -> None:
    names = set()
    for seed in range(6):
        answer = ask(client, tools=TOOLS, tool_choice="required", seed=seed).choices[0]
        (call,) = answer.message.tool_calls
        names.add(call.function.name)
        tool = next(t for t in TOOLS if t["function"]["name"] == call.function.name)
        check_json(tool["function"]["parameters"], call.function.arguments)
        assert answer.finish_reason == "tool_calls"
        stream = ask(client, tools=TOOLS, tool_choice="required", seed=seed, stream=True)
        deltas = [chunk.choices[0].delta for chunk in stream]
        calls = [piece for delta in deltas for piece in delta.tool_calls or []]
        assert calls[0].function.name == call.function.name
        assert "".join(c.function.arguments for c in calls) == call.function.arguments
    assert names <= {"draw", "erase"}


def test_a_call_can_be_answered(client: openai.OpenAI) -> None:
    choice = {"type": "function", "function": {"name": "erase"}}
    first = ask(client, tools=TOOLS, tool_choice=choice).choices[0].message
    said = first.model_dump(exclude_none=True)
    result = {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "done"}
    again = ask(client, messages=[*MESSAGES, said, result], tools=TOOLS, max_tokens=5)
    assert again.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    ("more", "param"),
    [
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {"type": "strin"}},
                }
            },
            "response_format",
        ),
        ({"extra_body": {"structured_outputs": {"regex": "(a"}}}, "structured_outputs"),
        ({"extra_body": {"guided_grammar": "start: b"}}, "guided_grammar"),
    ],
)
def test_a_wrong_form_is_the_clients_error(
    client: openai.OpenAI, more: dict[str, Any], param: str
) -> None:
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as error:
            ask(client, stream=stream, **more)
        assert error.value.param is not None and error.value.param.startswith(param)
        assert error.value.code == "invalid_grammar"


def test_hostile_forms_are_refused_in_time_and_the_service_goes_on(
    server: Server, client: openai.OpenAI
) -> None:
    engine = engine_pid(server)
    refusals: list[tuple[float, int]] = []

    def attack(number: int) -> None:
        schema = {"properties": {f"p{number}_{i}": {"type": "string"} for i in range(9000)}}
        start = time.monotonic()
        body = {"model": MODEL, "prompt": "x", "guided_json": schema}
        response = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)
        refusals.append((time.monotonic() - start, response.status_code))

    with ThreadPoolExecutor(4) as pool:
        attacks = [pool.submit(attack, number) for number in range(4)]
        slowest = 0.0
        while not all(a.done() for a in attacks):
            start = time.monotonic()
            ask(client, max_tokens=4)
            slowest = max(slowest, time.monotonic() - start)
    assert [status for _, status in refusals] == [400] * 4
    assert slowest < 2.0, "requests without a form go on"
    check_json(SCHEMA, ask(client, response_format=FORMAT).choices[0].message.content)
    assert engine_pid(server) == engine


def engine_pid(server: Server) -> int:
    """Of the engine among the server's children, some of which examine forms."""
    for pid in server.pids()[1:]:
        if "dovetail.core.engine.process" in Path(f"/proc/{pid}/cmdline").read_text():
            return pid
    raise AssertionError("there is no engine")


def test_an_answer_goes_on_when_the_engine_process_dies(
    server: Server, client: openai.OpenAI
) -> None:
    form = {"regex": "([a-z]{2,6} ){150}end"}
    stream = ask(
        client, max_tokens=900, seed=1, stream=True, extra_body={"structured_outputs": form}
    )
    pieces = []
    for chunk in stream:
        pieces.append(chunk.choices[0].delta.content or "")
        if len(pieces) == 20:
            os.kill(engine_pid(server), signal.SIGKILL)
    assert re.fullmatch(form["regex"], "".join(pieces))


def test_many_forms_at_once(server: Server) -> None:
    lock, wrong = threading.Lock(), []

    def one(number: int) -> None:
        schema = {**SCHEMA, "title": f"t{number % 5}"}
        body = {
            "model": MODEL,
            "messages": MESSAGES,
            "max_tokens": 300,
            "seed": number,
            "response_format": {"type": "json_object", "schema": schema},
        }
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        text = answer["choices"][0]["message"]["content"]
        try:
            check_json(schema, text)
        except ValueError:
            with lock:
                wrong.append(text)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, range(32)))
    assert not wrong
    assert json.loads(httpx.get(f"{server.url}/ready").text)["status"]
