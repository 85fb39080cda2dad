"""Hostile input: never a 500, always the envelope, and nobody else is disturbed."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dovetail.core.server.settings import Limits
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import CHAT, COMPLETIONS, MESSAGES, client_of, envelope

PATHS = [COMPLETIONS, CHAT]
NUMBERS = ["NaN", "Infinity", "-Infinity", "1e400", "-1e400", "-0", "5e-324", "true", '"1"', "[]"]
NUMBERS += ["{}", str(2**31), str(2**63), str(2**64), "-1", "1" + "0" * 100, "9" * 5000, "1.5"]
NUMERIC = ["n", "max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "logprobs"]
NUMERIC += ["presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens"]
NUMERIC += ["prompt_logprobs", "priority", "truncate_prompt_tokens", "top_logprobs", "best_of"]
LEAKS = ["/home", "/work", "/models", "site-packages", "0x7f", "Traceback", "dovetail.core", ".py"]


def body(path: str, extra: str) -> bytes:
    base = '"prompt": "x"' if path == COMPLETIONS else f'"messages": {json.dumps(MESSAGES)}'
    return f"{{{base}, {extra}}}".encode("utf-8", "surrogatepass")


async def post(engine: FakeEngine, path: str, data: bytes, **headers: str) -> httpx.Response:
    async with client_of(engine) as client:
        sent = {"content-type": "application/json"} | headers
        return await client.post(path, content=data, headers=sent)


def check(response: httpx.Response) -> None:
    assert response.status_code != 500, response.text
    if response.status_code != 200:
        assert len(response.content) < 1600
        envelope(response)
        assert not any(leak in response.text for leak in LEAKS), response.text


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", NUMERIC)
async def test_every_number_in_every_numeric_field(path: str, field: str) -> None:
    engine = FakeEngine(max_model_len=64)
    for number in NUMBERS:
        check(await post(engine, path, body(path, f'"{field}": {number}')))
    for call in engine.calls:
        values = [getattr(call["params"], name) for name in call["params"].__struct_fields__]
        assert all(math.isfinite(v) for v in values if isinstance(v, float))


VALUES = [
    "null",
    "true",
    "0",
    "-1",
    '"x"',
    '""',
    "[]",
    "[[]]",
    "[null]",
    "{}",
    '{"a": null}',
    '"\\u0000"',
    '"\\ud800"',
    '"\ud800"',
    '"\\ud83d\\ude00"',
    "[1, [2, [3]]]",
    '["x", 1, null]',
    "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000,
    '"' + "x" * 100_000 + '"',
    '{"type": "' + "x" * 10_000 + '"}',
]
FIELDS = ["prompt", "messages", "model", "stop", "stop_token_ids", "logit_bias", "stream"]
FIELDS += ["stream_options", "tools", "tool_choice", "response_format", "chat_template_kwargs"]
FIELDS += ["documents", "cache_salt", "echo", "suffix", "user", "allowed_token_ids", "modalities"]
FIELDS += ["reasoning_effort", "chat_template", "functions", "audio", "unknown_field"]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("field", FIELDS)
async def test_every_shape_in_every_field(path: str, field: str) -> None:
    engine = FakeEngine(max_model_len=64)
    for value in VALUES:
        check(await post(engine, path, body(path, f'"{field}": {value}')))


MESSAGE_PARTS = [
    '{"role": "user"}',
    '{"role": "user", "content": null}',
    '{"role": "user", "content": {}}',
    '{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}',
    '{"role": "user", "content": [{"type": "' + "z" * 5000 + '"}]}',
    '{"role": "' + "z" * 5000 + '", "content": "x"}',
    '{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "['
    + "[" * 5000
    + '"}}]}',
    '{"role": "assistant", "tool_calls": [{"function": {"name": null}}]}',
    '{"role": "tool", "content": []}',
    "null",
    "[]",
    '"x"',
]


@pytest.mark.parametrize("message", MESSAGE_PARTS)
async def test_odd_messages(message: str) -> None:
    engine = FakeEngine()
    response = await post(engine, CHAT, f'{{"messages": [{message}]}}'.encode())
    check(response)
    assert response.status_code in (200, 400)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "data",
    [b"", b"null", b"[]", b"1", b"{", b'{"', b"\x00", b"\xff\xfe{\x00}\x00", b"{}" * 1000],
)
async def test_bodies_that_are_no_object(path: str, data: bytes) -> None:
    response = await post(FakeEngine(), path, data)
    check(response)
    assert response.status_code == 400


@pytest.mark.parametrize("path", [*PATHS, "/tokenize", "/detokenize"])
@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "json"])
async def test_other_content_types_say_what_to_add(path: str, kind: str) -> None:
    response = await post(FakeEngine(), path, b"{}", **{"content-type": kind})
    assert response.status_code == 415
    assert "add -H 'Content-Type: application/json'" in envelope(response)["message"]


async def test_compressed_bodies_are_refused_unread() -> None:
    response = await post(FakeEngine(), CHAT, b"\x1f\x8b", **{"content-encoding": "gzip"})
    assert response.status_code == 415
    envelope(response)


@pytest.mark.parametrize("chunked", [False, True])
async def test_the_application_bounds_bodies_by_itself(chunked: bool) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        while True:
            sent.append(1)
            yield b" " * 1000

    sent: list[int] = []
    async with client_of(FakeEngine(), limits=Limits(body_bytes=5000)) as client:
        content = pieces() if chunked else b" " * 5001
        headers = {"content-type": "application/json"}
        response = await client.post(CHAT, content=content, headers=headers)
    assert response.status_code == 413
    assert envelope(response)["code"] == "request_too_large"
    assert response.headers["connection"] == "close"
    assert len(sent) in (0, 6)


async def test_json_with_a_charset_is_json() -> None:
    kind = {"content-type": "Application/JSON; charset=utf-8"}
    assert (await post(FakeEngine(), COMPLETIONS, b'{"prompt":"x"}', **kind)).status_code == 200


@pytest.mark.parametrize(
    ("path", "data"),
    [
        ("/tokenize", b"{}"),
        ("/tokenize", b'{"prompt": "x", "messages": []}'),
        ("/tokenize", b'{"messages": [{"role": "user"}]}'),
        ("/tokenize", b'{"prompt": "\\ud800"}'),
        ("/detokenize", b"{}"),
        ("/detokenize", b'{"tokens": [-1]}'),
        ("/detokenize", b'{"tokens": [300]}'),
        ("/detokenize", b'{"tokens": [1e400]}'),
        ("/detokenize", b'{"tokens": "x"}'),
    ],
)
async def test_the_tokenizer_routes_are_as_strict(path: str, data: bytes) -> None:
    response = await post(FakeEngine(), path, data)
    check(response)
    assert response.status_code == 400


async def test_others_are_unaffected_while_hostile_requests_come() -> None:
    engine = FakeEngine(step_s=0.002)
    async with client_of(engine) as client:
        honest = asyncio.create_task(
            client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 20})
        )
        headers = {"content-type": "application/json"}
        while not honest.done():
            for path in PATHS:
                for value in VALUES:
                    data = body(path, f'"max_tokens": 2, "tools": {value}')
                    await client.post(path, content=data, headers=headers)
    assert (await honest).json()["choices"][0]["text"] == "abcdefghij" * 2


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=12,
)
NAMES = st.sampled_from([*NUMERIC, *FIELDS])


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(path=st.sampled_from(PATHS), fields=st.dictionaries(NAMES, JSON, max_size=4))
def test_arbitrary_bodies(path: str, fields: dict[str, Any]) -> None:
    base = {"prompt": "x", "messages": MESSAGES, "max_tokens": 2} | fields
    engine = FakeEngine(max_model_len=64)
    response = asyncio.run(post(engine, path, json.dumps(base).encode()))
    assert response.status_code in (200, 400, 404), response.text
    if response.status_code != 200:
        envelope(response)
        assert not any(leak in response.text for leak in LEAKS)
