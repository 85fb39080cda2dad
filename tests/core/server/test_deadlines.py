"""What a client sees of deadlines and of a full queue."""

import pytest

from dovetail.core.errors import ConfigError, OverloadedError, RequestTimeoutError
from dovetail.core.server.settings import ServerSettings
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import (
    CHAT,
    COMPLETIONS,
    MESSAGES,
    checked_error,
    client_of,
    complete,
    envelope,
    refused,
    streamed,
)

LATE = RequestTimeoutError("The request was not finished within 2 s.")


async def timeouts(engine: FakeEngine, header: str | None = None, **body: object) -> float | None:
    """What the engine is told, for a request that the server has for hardly any time."""
    async with client_of(engine, request_timeout_s=50.0) as client:
        headers = {} if header is None else {"X-Request-Timeout": header}
        response = await client.post(COMPLETIONS, json={"prompt": "hi"} | body, headers=headers)
    assert response.status_code == 200, response.text
    told: float | None = engine.calls[-1]["timeout"]
    return told


async def test_the_field_goes_before_the_header_before_the_setting() -> None:
    engine = FakeEngine()
    for header, body, want in ((None, {}, 50), ("20", {}, 20), ("20", {"timeout": 7.5}, 7.5)):
        told = await timeouts(engine, header, **body)
        assert told is not None and want - 1 < told < want
    await complete(engine)
    assert engine.calls[-1]["timeout"] is None


@pytest.mark.parametrize("value", [0, -1, 1e9])
async def test_a_wrong_timeout_is_refused(value: float) -> None:
    error = await refused(FakeEngine(), COMPLETIONS, timeout=value)
    assert error["param"] == "timeout"
    assert "a number of seconds above 0 and at most 604800" in error["message"]


@pytest.mark.parametrize("value", ["soon", "0", "nan", "inf", "-3"])
async def test_a_wrong_header_is_refused(value: str) -> None:
    async with client_of(FakeEngine()) as client:
        response = await client.post(
            CHAT, json={"messages": MESSAGES}, headers={"X-Request-Timeout": value}
        )
    assert response.status_code == 400
    assert envelope(response)["param"] == "x-request-timeout"


@pytest.mark.parametrize("stream", [False, True])
async def test_before_the_first_token_it_is_status_504(stream: bool) -> None:
    engine = FakeEngine()
    engine.fail_at = {0: LATE}
    async with client_of(engine) as client:
        response = await client.post(CHAT, json={"messages": MESSAGES, "stream": stream})
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
    error = envelope(response)
    assert (error["code"], error["type"]) == ("timeout", "server_error")
    assert error["message"] == "The request was not finished within 2 s."


async def test_a_whole_answer_that_is_late_is_status_504() -> None:
    engine = FakeEngine()
    engine.fail_at = {3: LATE}
    async with client_of(engine) as client:
        response = await client.post(COMPLETIONS, json={"prompt": "hi"})
    assert response.status_code == 504
    assert envelope(response)["code"] == "timeout"


async def test_a_stream_that_is_late_ends_with_an_error_event() -> None:
    engine = FakeEngine()
    engine.fail_at = {3: LATE}
    *tokens, last = await streamed(engine, COMPLETIONS)
    assert "".join(event["choices"][0]["text"] for event in tokens) == "abc"
    assert all(event["choices"][0]["finish_reason"] is None for event in tokens)
    assert checked_error(last)["code"] == "timeout"


async def test_late_requests_are_counted() -> None:
    engine = FakeEngine()
    engine.fail_at = {0: LATE}
    async with client_of(engine, public_paths=("/metrics",)) as client:
        await client.post(COMPLETIONS, json={"prompt": "hi"})
        text = (await client.get("/metrics")).text
    line = next(
        line
        for line in text.splitlines()
        if line.startswith("dovetail:request_success_total") and 'finished_reason="timeout"' in line
    )
    assert line.endswith(" 1.0")


async def test_a_full_queue_refuses_before_the_request_is_read() -> None:
    engine = FakeEngine()
    engine.full = OverloadedError("The queue is full: 9 requests wait already.", retry_after=7)
    prompt = "word " * 100_000
    async with client_of(engine) as client:
        response = await client.post(COMPLETIONS, content=b'{"prompt": "' + prompt.encode())
    assert response.status_code == 429, "a body that is no JSON was parsed"
    assert response.headers["retry-after"] == "7"
    error = envelope(response)
    assert (error["code"], error["type"]) == ("overloaded", "rate_limit_error")
    assert not engine.calls


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("inf"), float("nan")])
def test_a_wrong_setting_is_refused(seconds: float) -> None:
    with pytest.raises(ConfigError, match="request_timeout_s"):
        ServerSettings(request_timeout_s=seconds)
