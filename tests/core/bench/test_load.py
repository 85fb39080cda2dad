import asyncio

import pytest

from dovetail.core.bench.client import CHAT, COMPLETIONS, first_model, stream_chat
from dovetail.core.bench.http import HttpClient, HttpClientError
from dovetail.core.bench.load import Load, run_load
from dovetail.core.bench.workloads import Sample
from dovetail.core.errors import ConfigError

from .servers import DONE, event, scripted, text, usage


class About:
    """Equal to a time that was not cut short, with room for a busy machine."""

    def __init__(self, seconds):
        self.seconds = seconds

    def __eq__(self, measured):
        return self.seconds - 0.02 <= measured <= self.seconds + 0.4

    def __repr__(self):
        return f"about {self.seconds}"


about = About
SAMPLE = Sample(token_ids=[1, 2, 3], output_len=5)


def run_one(script, **settings):
    async def work():
        async with scripted(script) as server:
            client = HttpClient(server.url)
            load = Load(route=COMPLETIONS, model="m", **settings)
            traces, duration = await run_load(client, load, [SAMPLE], [0.0])
            await client.close()
            return traces[0], duration, server

    return asyncio.run(work())


def test_times_of_a_stream():
    script = [0.1, text("a"), 0.2, text("bc"), text(""), 0.1, usage(7, 4), DONE]
    trace, duration, server = run_one(lambda *_: script, ignore_eos=True, extra={"top_k": 3})
    assert trace.success
    assert trace.ttft == about(0.1)
    assert trace.itls == [about(0.2)]
    assert trace.latency == about(0.3)
    assert duration == about(0.4)
    assert (trace.prompt_len, trace.output_len, trace.text) == (7, 4, "abc")
    method, path, headers, body = server.requests[0]
    assert (method, path, headers["content-type"]) == ("POST", COMPLETIONS, "application/json")
    assert body == {
        "model": "m",
        "stream": True,
        "stream_options": {"include_usage": True},
        "prompt": [1, 2, 3],
        "max_tokens": 5,
        "ignore_eos": True,
        "top_k": 3,
    }


def test_an_event_may_come_in_pieces():
    whole = text("a") + b": keep-alive\n\n" + text("b") + DONE
    trace, _, _ = run_one(lambda *_: [whole[:9], whole[9:40], whole[40:]])
    assert trace.text == "ab"
    assert (trace.prompt_len, trace.output_len) == (3, 2)


def test_an_answer_without_text_counts_from_its_end():
    trace, _, _ = run_one(lambda *_: [0.1, text(""), usage(3, 1), DONE])
    assert trace.success
    assert trace.ttft == trace.latency == about(0.1)
    assert trace.tpot is None


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ((429, {"error": {"message": "too many"}}), "status 429: too many"),
        ((500, {"error": "Unauthorized"}), "status 500: Unauthorized"),
        ((404, ["?"]), 'status 404: ["?"]'),
        ([text("a"), event(error={"message": "boom"}), DONE], "the server broke off: boom"),
        ([text("a"), None], "the server broke off"),
        ([b"data: nonsense\n\n", DONE], "the server sent what is not OpenAI's"),
    ],
)
def test_failures_end_up_in_the_trace(script, message):
    trace, _, _ = run_one(lambda *_: script)
    assert not trace.success
    assert trace.error.startswith(message)


def test_nobody_listens():
    async def work():
        async with scripted(lambda *_: []) as server:
            url = server.url
        client = HttpClient(url)
        await run_one_load(client)

    async def run_one_load(client):
        traces, _ = await run_load(client, Load(route=CHAT, model="m"), [SAMPLE], [0.0])
        assert "cannot be reached" in traces[0].error

    asyncio.run(work())


def run_many(count, times, **settings):
    async def work():
        script = [0.05, text("a"), usage(3, 1), DONE]
        async with scripted(lambda *_: script) as server:
            client = HttpClient(server.url)
            load = Load(route=COMPLETIONS, model="m", **settings)
            done = []
            traces, duration = await run_load(client, load, [SAMPLE] * count, times, done.append)
            assert done == list(range(1, count + 1))
            await client.close()
            return traces, duration, server

    return asyncio.run(work())


def test_the_limit_on_requests_under_way():
    traces, _, server = run_many(12, [0.0] * 12, max_concurrency=4)
    assert all(trace.success for trace in traces)
    assert server.peak == 4
    assert server.num_connections == 4, "connections are kept and used again"
    assert max(trace.queue_time for trace in traces) > 0.05
    starts = sorted(trace.start_time for trace in traces)
    assert starts[-1] - starts[0] >= 0.09, "waiting in the client is not the server's"


def test_requests_are_sent_when_they_are_due():
    times = [0.0, 0.1, 0.2, 0.3]
    traces, duration, _ = run_many(4, times)
    starts = [trace.start_time - traces[0].start_time for trace in traces]
    assert starts == [about(t) for t in times]
    assert duration == about(0.35)


def test_an_idle_connection_that_was_closed_is_replaced():
    async def work():
        async with scripted(
            lambda *_: (200, {"data": [{"id": "m", "max_model_len": 9}]})
        ) as server:
            client = HttpClient(server.url)
            assert (await first_model(client)).max_model_len == 9
            client.idle[0].writer.close()
            await client.idle[0].writer.wait_closed()
            assert (await first_model(client)).id == "m"
            await client.close()

    asyncio.run(work())


def test_no_models():
    async def work(answer):
        async with scripted(lambda *_: (200, answer)) as server:
            await first_model(HttpClient(server.url))

    with pytest.raises(HttpClientError, match="serves no model"):
        asyncio.run(work({"data": []}))
    with pytest.raises(HttpClientError, match="is not OpenAI's"):
        asyncio.run(work({"hello": 1}))


def test_chat_streams_and_ends_when_left():
    def delta(piece):
        return event(choices=[{"index": 0, "delta": {"content": piece}}])

    async def work():
        script = [delta("a"), delta("b"), 0.1, delta("c"), 0.3, delta("d"), 0.3, delta("e"), DONE]
        async with scripted(lambda *_: script) as server:
            client = HttpClient(server.url + "/prefix/", headers={"Authorization": "Bearer k"})
            pieces = []
            stream = stream_chat(client, "m", [{"role": "user", "content": "hi"}], temperature=0)
            async for piece in stream:
                pieces.append(piece)
                if piece == "c":
                    break
            await stream.aclose()
            await asyncio.sleep(0.8)
            assert pieces == ["a", "b", "c"]
            assert server.num_cut == 1
            _, path, headers, body = server.requests[0]
            assert (path, headers["authorization"]) == ("/prefix" + CHAT, "Bearer k")
            assert body["temperature"] == 0

    asyncio.run(work())


@pytest.mark.parametrize("url", ["ftp://x", "http://", "http://x:port", "http://x:99999"])
def test_addresses_that_are_none(url):
    with pytest.raises(ConfigError, match="is no http"):
        HttpClient(url)
