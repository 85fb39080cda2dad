"""The official client against a server on a socket."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import openai
import pytest
import pytest_asyncio

from dovetail.core.errors import OverloadedError, RequestFailedError
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import MESSAGES, Running, serving, until

MODEL = "org/model"


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest_asyncio.fixture
async def running(engine: FakeEngine) -> AsyncIterator[Running]:
    async with serving(engine, api_keys=("key",)) as running:
        yield running


@pytest.fixture
def client(running: Running) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="key", max_retries=0)


async def test_models(client: openai.AsyncOpenAI) -> None:
    assert [model.id async for model in client.models.list()] == [MODEL]
    assert (await client.models.retrieve(MODEL)).id == MODEL
    with pytest.raises(openai.NotFoundError) as found:
        await client.models.retrieve("other")
    assert found.value.code == "model_not_found"


async def test_chat(client: openai.AsyncOpenAI) -> None:
    answer = await client.chat.completions.create(
        model=MODEL, messages=MESSAGES, max_completion_tokens=3, logprobs=True, top_logprobs=2
    )
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("abc", "length")
    assert choice.message.tool_calls is None
    assert [token.token for token in choice.logprobs.content] == ["a", "b", "c"]
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


async def test_chat_stream(client: openai.AsyncOpenAI) -> None:
    stream = await client.chat.completions.create(
        model=MODEL,
        messages=MESSAGES,
        max_tokens=3,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == "abc"
    assert chunks[-1].usage.completion_tokens == 3


async def test_the_streaming_helper_understands_the_stream(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.finish_reason = "stop"
    async with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, max_tokens=3
    ) as stream:
        async for _ in stream:
            pass
        final = await stream.get_final_completion()
    assert final.choices[0].message.content == "abc"
    assert final.choices[0].finish_reason == "stop"


async def test_completions(client: openai.AsyncOpenAI) -> None:
    answer = await client.completions.create(
        model=MODEL, prompt=["x", "y"], n=2, max_tokens=2, echo=True, logprobs=2
    )
    assert [choice.text for choice in answer.choices] == ["xab", "xab", "yab", "yab"]
    assert answer.choices[0].logprobs.token_logprobs == [None, -1.0, -1.0, -1.0]
    stream = await client.completions.create(model=MODEL, prompt="x", max_tokens=4, stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "abcd"


def test_the_synchronous_client_too() -> None:
    async def run() -> None:
        async with serving(FakeEngine()) as running:
            await asyncio.to_thread(use, running.url)

    def use(url: str) -> None:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        chat: Any = {"model": MODEL, "messages": MESSAGES, "max_tokens": 2}
        assert client.chat.completions.create(**chat).choices[0].message.content == "ab"
        stream = client.chat.completions.create(**chat, stream=True)
        assert "".join(c.choices[0].delta.content or "" for c in stream) == "ab"
        with pytest.raises(openai.BadRequestError):
            client.completions.create(model=MODEL, prompt="x", n=0)

    asyncio.run(run())


async def test_errors_are_the_clients_own_classes(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    ask: Any = {"model": MODEL, "messages": MESSAGES}
    with pytest.raises(openai.BadRequestError) as bad:
        await client.chat.completions.create(**ask, temperature=-1)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    assert "temperature must be a number from 0 to 100, not -1.0." in bad.value.message
    with pytest.raises(openai.BadRequestError) as long:
        await client.chat.completions.create(**ask, max_tokens=10_000)
    assert long.value.code == "context_length_exceeded"
    assert "This model's maximum context length is" in long.value.message
    with pytest.raises(openai.NotFoundError):
        await client.chat.completions.create(**ask | {"model": "x"})
    with pytest.raises(openai.AuthenticationError):
        await client.with_options(api_key="wrong").chat.completions.create(**ask)
    engine.fail_at = {0: OverloadedError("full", retry_after=7)}
    with pytest.raises(openai.RateLimitError) as full:
        await client.chat.completions.create(**ask)
    assert full.value.response.headers["retry-after"] == "7"
    engine.fail_at = {0: RequestFailedError("x")}
    with pytest.raises(openai.InternalServerError):
        await client.chat.completions.create(**ask)


async def test_an_error_in_mid_stream_is_raised(
    client: openai.AsyncOpenAI, engine: FakeEngine
) -> None:
    engine.fail_at = {2: RequestFailedError("x")}
    stream = await client.completions.create(model=MODEL, prompt="x", stream=True)
    texts = []
    with pytest.raises(openai.APIError) as failed:
        async for chunk in stream:
            texts.append(chunk.choices[0].text)
    assert texts == ["a", "b"]
    assert failed.value.code == "request_failed"


async def test_breaking_off_a_stream_aborts(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.step_s = 0.01
    stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    await stream.close()
    await until(lambda: engine.running == 0)
    assert len(engine.aborted) == 1


async def test_a_timeout_aborts(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.step_s = 0.01
    with pytest.raises(openai.APITimeoutError):
        await client.with_options(timeout=0.2).chat.completions.create(
            model=MODEL, messages=MESSAGES
        )
    await until(lambda: engine.running == 0)


async def test_retries_while_the_model_loads(running: Running, engine: FakeEngine) -> None:
    engine.set_state("loading", "1 of 2")
    client = openai.AsyncOpenAI(base_url=f"{running.url}/v1", api_key="key", max_retries=2)
    ask = asyncio.create_task(
        client.chat.completions.create(model=MODEL, messages=MESSAGES, max_tokens=1)
    )
    await asyncio.sleep(0.2)
    engine.set_state("ready")
    assert (await ask).choices[0].message.content == "a"


async def test_forty_at_once(client: openai.AsyncOpenAI, engine: FakeEngine) -> None:
    engine.step_s = 0.005

    async def one() -> str:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, max_tokens=20, stream=True
        )
        return "".join([c.choices[0].delta.content or "" async for c in stream])

    assert set(await asyncio.gather(*(one() for _ in range(40)))) == {"abcdefghij" * 2}
    assert engine.most_running == 40
