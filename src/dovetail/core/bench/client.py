"""Requests of a benchmark, and the conversation of a chat, against an OpenAI-compatible server."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

import msgspec

from dovetail.core.bench.http import HttpClient, HttpClientError, failure_of
from dovetail.core.bench.metrics import Trace
from dovetail.core.bench.workloads import Sample

__all__ = [
    "CHAT",
    "COMPLETIONS",
    "ServedModel",
    "first_model",
    "request_body",
    "send",
    "stream_chat",
]

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
"""The routes that a benchmark can use."""


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None

    @property
    def content(self) -> str:
        if self.delta is None:
            return self.text or ""
        return self.delta.content or self.delta.reasoning_content or ""


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int | None = 0


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class ServedModel(msgspec.Struct, frozen=True):
    """One card of ``GET /v1/models``."""

    id: str
    root: str | None = None
    """Folder or name that the model was loaded from."""
    max_model_len: int | None = None


class _Models(msgspec.Struct):
    data: list[ServedModel]


_DECODER = msgspec.json.Decoder(_Chunk)


async def first_model(client: HttpClient) -> ServedModel:
    """The model that the server offers first.

    Raises:
        HttpClientError: It cannot be reached, refuses, or offers none.
    """
    answer = await client.json("GET", "/v1/models")
    try:
        models = msgspec.convert(answer, _Models)
    except msgspec.ValidationError as error:
        raise HttpClientError(f"{client.base_url}/v1/models is not OpenAI's: {error}") from error
    if not models.data:
        raise HttpClientError(f"{client.base_url} serves no model")
    return models.data[0]


def request_body(
    sample: Sample, route: str, model: str, *, ignore_eos: bool, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """The body of the streaming request that a sample asks for.

    Completions get the prompt's text if there is one, else its token ids; chats need the text.
    """
    body: dict[str, Any] = {
        "model": model,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if route == CHAT:
        body["messages"] = [{"role": "user", "content": sample.text or ""}]
        body["max_completion_tokens"] = sample.output_len
    else:
        body["prompt"] = sample.text if sample.text is not None else sample.token_ids
        body["max_tokens"] = sample.output_len
    if ignore_eos:
        body["ignore_eos"] = True
    return body | dict(extra)


async def send(client: HttpClient, route: str, body: Mapping[str, Any], trace: Trace) -> None:
    """Make one request and fill in its trace. Failures end up in the trace, never raise."""
    trace.start_time = time.perf_counter()
    try:
        await _follow(client, route, body, trace)
    except HttpClientError as error:
        trace.error = str(error)


async def _follow(client: HttpClient, route: str, body: Mapping[str, Any], trace: Trace) -> None:
    response = await client.request("POST", route, body)
    try:
        if response.status != 200:
            raise failure_of(response.status, await response.read())
        latest = 0.0
        pieces: list[str] = []
        counted = False
        async for data in response.events():
            if data == b"[DONE]":
                continue
            chunk = _decode(data)
            content = chunk.choices[0].content if chunk.choices else ""
            if content:
                now = time.perf_counter()
                if not pieces:
                    trace.ttft = now - trace.start_time
                else:
                    trace.itls.append(now - latest)
                latest = now
                pieces.append(content)
            if chunk.usage is not None:
                counted = True
                trace.prompt_len = chunk.usage.prompt_tokens
                trace.output_len = chunk.usage.completion_tokens or 0
    finally:
        response.close()
    _finish(trace, pieces, latest, counted)


def _finish(trace: Trace, pieces: list[str], latest: float, counted: bool) -> None:
    """An answer without any text counts from its end."""
    trace.latency = (latest or time.perf_counter()) - trace.start_time
    if not pieces:
        trace.ttft = trace.latency
    if not counted:
        trace.output_len = len(pieces)
    trace.text = "".join(pieces)
    trace.success = True


def _decode(data: bytes) -> _Chunk:
    try:
        chunk = _DECODER.decode(data)
    except msgspec.DecodeError as error:
        raise HttpClientError(f"the server sent what is not OpenAI's: {error}") from error
    if chunk.error is not None:
        message = chunk.error.get("message") if isinstance(chunk.error, dict) else chunk.error
        raise HttpClientError(f"the server broke off: {message}")
    return chunk


async def stream_chat(
    client: HttpClient, model: str, messages: Sequence[Mapping[str, Any]], **params: Any
) -> AsyncIterator[str]:
    """The answer to a conversation, piece by piece. Ending the iteration ends the request.

    Raises:
        HttpClientError: The server cannot be reached, refused, or broke off.
    """
    body = {"model": model, "messages": list(messages), "stream": True, **params}
    response = await client.request("POST", CHAT, body)
    try:
        if response.status != 200:
            raise failure_of(response.status, await response.read())
        async for data in response.events():
            if data == b"[DONE]":
                continue
            chunk = _decode(data)
            if chunk.choices and chunk.choices[0].content:
                yield chunk.choices[0].content
    finally:
        response.close()
