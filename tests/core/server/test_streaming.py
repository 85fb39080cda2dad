"""Streams: which chunks come, in which order, and what happens when they cannot."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from dovetail.core.errors import (
    EngineDeadError,
    OverloadedError,
    RequestError,
    RequestFailedError,
)
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    checked_error,
    client_of,
    envelope,
    events,
    streamed,
)


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


async def test_a_chat_stream_begins_with_the_role_and_ends_with_an_empty_delta(
    engine: FakeEngine,
) -> None:
    chunks = await streamed(engine, CHAT, max_tokens=2)
    assert [chunk["choices"] for chunk in chunks] == [
        [_part({"role": "assistant", "content": ""})],
        [_part({"content": "a"})],
        [_part({"content": "b"})],
        [_part({}, finish_reason="length", stop_reason=None)],
    ]
    assert len({(c["id"], c["created"], c["model"], c["object"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert not any("usage" in chunk for chunk in chunks)


def _part(delta: dict[str, Any], finish_reason: str | None = None, **more: Any) -> dict[str, Any]:
    return {
        "index": 0,
        "delta": delta,
        "logprobs": None,
        "finish_reason": finish_reason,
        **more,
    }


async def test_a_completion_stream_ends_with_text_and_reason_together(engine: FakeEngine) -> None:
    chunks = await streamed(engine, COMPLETIONS, max_tokens=2)
    assert [(c["choices"][0]["text"], c["choices"][0]["finish_reason"]) for c in chunks] == [
        ("a", None),
        ("b", "length"),
    ]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_usage_comes_last_and_without_choices(engine: FakeEngine, path: str) -> None:
    *rest, last = await streamed(engine, path, max_tokens=3, stream_options={"include_usage": True})
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 2}
    assert not any("usage" in chunk for chunk in rest)
    off = {"include_usage": False, "continuous_usage_stats": None, "include_obfuscation": False}
    assert all(c["choices"] for c in await streamed(engine, path, stream_options=off))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_usage_in_every_chunk(engine: FakeEngine, path: str) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = await streamed(engine, path, max_tokens=3, stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts) and counts[-1] == 3
    assert all(c["usage"]["total_tokens"] >= c["usage"]["prompt_tokens"] for c in chunks)


async def test_several_prompts_and_choices_in_one_stream(engine: FakeEngine) -> None:
    chunks = await streamed(engine, COMPLETIONS, prompt=["a", "b"], n=2, max_tokens=3)
    texts = dict.fromkeys(range(4), "")
    for chunk in chunks:
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
    assert texts == dict.fromkeys(range(4), "abc")


async def test_several_chat_choices(engine: FakeEngine) -> None:
    chunks = await streamed(engine, CHAT, n=2, max_tokens=1)
    order = [(c["choices"][0]["index"], list(c["choices"][0]["delta"])) for c in chunks]
    role, content = ["role", "content"], ["content"]
    assert order == [(0, role), (1, role), (0, content), (0, []), (1, content), (1, [])]


async def test_chat_logprobs_cover_the_tokens_of_their_chunk(engine: FakeEngine) -> None:
    chunks = await streamed(engine, CHAT, max_tokens=2, logprobs=True, top_logprobs=1)
    parts = [chunk["choices"][0] for chunk in chunks]
    tokens = [[t["token"] for t in p["logprobs"]["content"]] for p in parts if p["logprobs"]]
    assert tokens == [["a"], ["b"]]
    assert parts[0]["logprobs"] is None and parts[-1]["logprobs"] is None


async def test_completion_logprobs_carry_on_their_offsets(engine: FakeEngine) -> None:
    chunks = await streamed(engine, COMPLETIONS, max_tokens=3, logprobs=0)
    offsets = [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks]
    assert offsets == [[0], [1], [2]]


async def test_echo_comes_as_the_first_chunk_of_each_choice(engine: FakeEngine) -> None:
    chunks = await streamed(engine, COMPLETIONS, prompt="hi", echo=True, n=2, max_tokens=1)
    assert [(c["choices"][0]["index"], c["choices"][0]["text"]) for c in chunks] == [
        (0, "hi"),
        (0, "a"),
        (1, "hi"),
        (1, "a"),
    ]
    scored = await streamed(engine, COMPLETIONS, prompt=[104, 105], echo=True, logprobs=1)
    assert scored[0]["choices"][0]["logprobs"]["token_logprobs"] == [None, -1.0]
    assert scored[1]["choices"][0]["logprobs"]["text_offset"] == [2]


async def test_token_ids_in_streams(engine: FakeEngine) -> None:
    text = await streamed(engine, COMPLETIONS, max_tokens=2, return_token_ids=True)
    assert text[0]["choices"][0]["prompt_token_ids"] == [256, 104, 105]
    assert [c["choices"][0]["token_ids"] for c in text] == [[], [97], [98]]
    chats = await streamed(engine, CHAT, max_tokens=2, return_token_ids=True)
    assert bytes(chats[0]["prompt_token_ids"]).startswith(b"user: ")
    assert [c["choices"][0].get("token_ids") for c in chats] == [None, [97], [98], None]


async def test_headers_keep_proxies_from_holding_back(engine: FakeEngine) -> None:
    async with client_of(engine) as client:
        response = await client.post(CHAT, json={"messages": MESSAGES, "stream": True})
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


ERRORS = [
    (RequestFailedError("secret /opt/place"), 500, "server_error", "request_failed"),
    (OverloadedError("full", status=429, retry_after=3), 429, "rate_limit_error", "overloaded"),
    (OverloadedError("busy", status=503), 503, "server_error", "unavailable"),
    (EngineDeadError("secret"), 503, "server_error", "engine_dead"),
    (RequestError("bad", param="prompt"), 400, "invalid_request_error", None),
    (RuntimeError("secret 0x7f00"), 500, "server_error", "internal_error"),
]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("error", "status", "kind", "code"), ERRORS)
async def test_an_error_before_the_first_token_is_an_http_error(
    engine: FakeEngine,
    path: str,
    stream: bool,
    error: Exception,
    status: int,
    kind: str,
    code: str | None,
) -> None:
    engine.fail_at = {0: error}
    async with client_of(engine) as client:
        body = {"prompt": "x", "messages": MESSAGES, "stream": stream}
        response = await client.post(path, json=body, headers={"x-request-id": "label"})
    assert response.status_code == status
    found = envelope(response)
    assert (found["type"], found["code"]) == (kind, code)
    assert "secret" not in response.text
    assert ("label" in found["message"]) == (status == 500)
    assert ("retry-after" in response.headers) == (status in (429, 503))


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(("error", "status", "kind", "code"), ERRORS)
async def test_an_error_in_mid_stream_is_an_event(
    engine: FakeEngine, path: str, error: Exception, status: int, kind: str, code: str | None
) -> None:
    engine.fail_at = {2: error}
    *chunks, last = await streamed(engine, path, max_tokens=5)
    assert all("choices" in chunk for chunk in chunks) and len(chunks) >= 2
    found = checked_error(last)
    assert (found["type"], found["code"]) == (kind, code)
    assert "secret" not in found["message"]


@pytest.mark.parametrize("reason", ["abort", "error"])
async def test_the_engines_own_reasons_never_reach_the_client(
    engine: FakeEngine, reason: str
) -> None:
    engine.finish_reason = reason
    *chunks, last = await streamed(engine, CHAT, max_tokens=2)
    assert checked_error(last)["type"] == "server_error"
    assert all(c["choices"][0]["finish_reason"] is None for c in chunks)


async def test_one_failing_prompt_ends_the_others(engine: FakeEngine) -> None:
    engine.step_s = 0.001
    engine.fail_at = {3: RequestFailedError("x")}
    *_, last = await streamed(engine, COMPLETIONS, prompt=["a", "b", "c"], max_tokens=50)
    assert "error" in last
    assert engine.running == 0 and len(engine.aborted) == 3


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
async def test_silence_is_filled_with_comments(path: str) -> None:
    engine = FakeEngine()
    engine.silent_first_s = 0.18
    async with client_of(engine, keep_alive_s=0.05) as client:
        body = {"prompt": "x", "messages": MESSAGES, "stream": True, "max_tokens": 2}
        response = await client.post(path, json=body)
    found = events(response.text)
    comments = [event for event in found if event == ": keep-alive"]
    assert 2 <= len(comments) <= 3
    assert found[: len(comments)] == comments
    assert "choices" in found[len(comments)]


async def test_a_busy_stream_has_no_comments() -> None:
    engine = FakeEngine(step_s=0.02)
    async with client_of(engine, keep_alive_s=0.1) as client:
        body = {"prompt": "x", "stream": True, "max_tokens": 15}
        response = await client.post(COMPLETIONS, json=body)
    assert ": keep-alive" not in response.text


async def test_an_error_after_a_comment_is_an_event() -> None:
    engine = FakeEngine()
    engine.silent_first_s = 0.1
    engine.fail_at = {0: RequestFailedError("x")}
    async with client_of(engine, keep_alive_s=0.04) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "x", "stream": True})
    assert response.status_code == 200
    assert checked_error(events(response.text)[-1])["code"] == "request_failed"


async def test_a_shutdown_ends_streams_with_an_event() -> None:
    engine = FakeEngine(step_s=0.01)
    async with client_of(engine) as client:
        admission = client._transport.app.state.context.admission  # type: ignore[attr-defined]
        body = {"prompt": "x", "stream": True, "max_tokens": 1000}
        post = asyncio.create_task(client.post(COMPLETIONS, json=body))
        while not engine.running:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        assert len(admission) == 1
        assert admission.abort_all(OverloadedError("stopping", status=503)) == 1
        found = events((await post).text)
    assert checked_error(found[-1])["message"] == "stopping"
    assert engine.running == 0 and len(admission) == 0
