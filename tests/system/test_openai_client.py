"""The bundled model through the official OpenAI client, unmodified, against a real server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from tests.servers import Server

MODEL = "dovetail-demo"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("server") / "log"
    server = Server(
        log, "--device", "cpu", "--dtype", "float32", "--threads", "1", "--api-key", "secret"
    )
    yield server
    assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="secret", max_retries=0) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "dovetail"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("another")
    assert error.value.code == "model_not_found"


def test_completions_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    ask = {"model": MODEL, "prompt": "import os\nimport ", "max_tokens": 24, "temperature": 0}
    whole = client.completions.create(**ask)
    chunks = list(
        client.completions.create(**ask, stream=True, stream_options={"include_usage": True})
    )
    assert "".join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert whole.usage is not None and chunks[-1].usage is not None
    assert whole.usage.completion_tokens == chunks[-1].usage.completion_tokens == 24
    assert whole.choices[0].finish_reason == "length"


def test_the_bundled_model_completes_python(client: openai.OpenAI) -> None:
    prompt = "def __init__(self, "
    answer = client.completions.create(
        model=MODEL, prompt=prompt, max_tokens=40, temperature=0, stop=["\n\n"]
    )
    text = answer.choices[0].text
    assert "):" in text and "self." in text, text


def test_chat_whole_and_streamed_are_the_same(client: openai.OpenAI) -> None:
    messages = [{"role": "user", "content": "for i in range("}]
    ask = {"model": MODEL, "messages": messages, "max_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**ask)  # type: ignore[call-overload]
    chunks = list(client.chat.completions.create(**ask, stream=True))  # type: ignore[call-overload]
    pieces = [c.choices[0].delta.content or "" for c in chunks]
    assert "".join(pieces) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_seeds_and_several_choices(client: openai.OpenAI) -> None:
    ask = {"model": MODEL, "prompt": "class ", "max_tokens": 12, "n": 3, "seed": 11}
    one, two = client.completions.create(**ask), client.completions.create(**ask)
    assert [c.text for c in one.choices] == [c.text for c in two.choices]
    assert len({c.text for c in one.choices}) > 1


def test_token_ids_echo_and_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt=[50, 51, 52], max_tokens=1, echo=True, logprobs=2, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert len(logprobs.token_logprobs) == 4
    assert logprobs.token_logprobs[0] is None
    assert all(value is not None and value <= 0 for value in logprobs.token_logprobs[1:])


def test_errors_are_the_clients_own(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt="x", max_tokens=100_000)
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as error:
        client.completions.create(model=MODEL, prompt=[10**9], max_tokens=1)
    assert error.value.param == "prompt"
    stranger = openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError):
        stranger.models.list()


async def test_many_at_once_with_the_async_client(server: Server) -> None:
    import asyncio

    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="secret") as client:

        async def ask(i: int) -> str:
            stream = await client.chat.completions.create(
                model=MODEL,
                messages=[{"role": "user", "content": f"x{i % 4} = "}],
                max_tokens=12,
                temperature=0,
                stream=True,
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        texts = await asyncio.gather(*(ask(i) for i in range(16)))
    assert all(texts[i] == texts[i % 4] for i in range(16))
