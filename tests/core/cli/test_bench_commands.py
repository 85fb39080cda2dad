import asyncio
import json
import threading
from contextlib import contextmanager

import pytest

import dovetail
from dovetail.core.cli import main
from dovetail.core.cli.bench_latency import latency_result
from dovetail.core.request import CompletionOutput, RequestOutput
from tests.core.bench.servers import DONE, event, scripted


class FakeLLM:
    """Gives as many tokens as are asked for, less what it is told to lack."""

    lack = 0
    calls: list = []  # noqa: RUF012

    def __init__(self, **settings):
        self.settings = settings

    def generate(self, prompts, params, *, use_tqdm):
        self.calls.append((prompts, params, self.settings))
        return [
            RequestOutput(
                request_id="r",
                prompt=None,
                prompt_token_ids=prompt["prompt_token_ids"],
                outputs=[
                    CompletionOutput(index=0, text="", token_ids=[1] * (p.max_tokens - self.lack))
                ],
                finished=True,
            )
            for prompt, p in zip(prompts, params, strict=True)
        ]


@pytest.fixture
def llm(monkeypatch):
    monkeypatch.setattr(dovetail, "LLM", FakeLLM, raising=False)
    monkeypatch.setattr(FakeLLM, "calls", [])
    return FakeLLM


def test_throughput(llm, tmp_path, capsys):
    file = tmp_path / "out" / "result.json"
    words = ["--num-prompts", "6", "--input-len", "10", "--output-len", "4", "--max-num-seqs", "3"]
    assert main(["bench", "throughput", *words, "--output-json", str(file)]) == 0
    warm_up, measured = llm.calls
    assert (len(warm_up[0]), len(measured[0])) == (4, 6)
    assert measured[2]["max_num_seqs"] == 3
    assert all(p.ignore_eos for p in measured[1])
    assert {len(p["prompt_token_ids"]) for p in measured[0]} == {10}
    result = json.loads(file.read_text())
    assert set(result) >= {
        "elapsed_time", "num_requests", "total_num_tokens", "requests_per_second",
        "tokens_per_second",
    }  # fmt: skip
    assert (result["num_requests"], result["total_num_tokens"]) == (6, 84)
    assert "Output token throughput" in capsys.readouterr().out


def test_throughput_says_when_tokens_are_missing(llm, capsys, monkeypatch):
    monkeypatch.setattr(llm, "lack", 1)
    words = ["--num-prompts", "2", "--output-len", "4", "--no-warmup", "--disable-detokenize"]
    assert main(["bench", "throughput", *words]) == 0
    assert "6 tokens came back, 8 were asked for" in capsys.readouterr().err
    assert len(llm.calls) == 1
    assert not llm.calls[0][1][0].detokenize


def test_throughput_with_prefixes(llm):
    words = ["--dataset-name", "prefix_repetition", "--num-prompts", "4",
             "--prefix-repetition-num-prefixes", "2", "--no-warmup"]  # fmt: skip
    assert main(["bench", "throughput", *words]) == 0
    prompts = [tuple(p["prompt_token_ids"]) for p in llm.calls[0][0]]
    assert len({p[:256] for p in prompts}) == 2
    assert len(set(prompts)) == 4


def test_sharegpt_needs_a_file(capsys, llm):
    assert main(["bench", "throughput", "--dataset-name", "sharegpt"]) in (1, 2)


def test_latency(llm, tmp_path, capsys):
    file = tmp_path / "result.json"
    words = ["--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "1"]
    assert main(["bench", "latency", *words, "--output-json", str(file)]) == 0
    assert len(llm.calls) == 4
    prompts = [tuple(p["prompt_token_ids"]) for call in llm.calls for p in call[0]]
    assert len(set(prompts)) == 8, "no prompt comes twice: it would be found in the prefix cache"
    result = json.loads(file.read_text())
    assert set(result) == {"avg_latency", "latencies", "percentiles"}
    assert len(result["latencies"]) == 3
    assert "P99 latency (ms)" in capsys.readouterr().out


def test_latency_result():
    result = latency_result([1.0, 2.0, 3.0])
    assert result["avg_latency"] == 2.0
    assert result["percentiles"]["50"] == 2.0


@contextmanager
def running(script):
    ready, stop = threading.Event(), threading.Event()
    found = []

    async def serve():
        async with scripted(script) as server:
            found.append(server)
            ready.set()
            await asyncio.to_thread(stop.wait)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    ready.wait()
    try:
        yield found[0]
    finally:
        stop.set()
        thread.join()


def answers(method, path, body):
    if method == "GET":
        return (200, {"data": [{"id": "m", "root": "dovetail-demo", "max_model_len": 64}]})
    if path.endswith("/chat/completions"):
        chunk = {"choices": [{"delta": {"content": "x"}}]}
        tokens = body["max_completion_tokens"]
    else:
        chunk, tokens = {"choices": [{"text": "x"}]}, body["max_tokens"]
    usage = {"prompt_tokens": 9, "completion_tokens": tokens}
    return [event(**chunk)] * tokens + [event(choices=[], usage=usage), DONE]


WORKLOAD = ["--num-prompts", "5", "--input-len", "9", "--output-len", "4"]


def test_serve_sends_token_ids(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("dovetail.core.tokenizer.load_tokenizer", lambda path: Vocabulary())
    with running(answers) as server:
        words = ["--base-url", server.url, "--save-result", "--result-dir", str(tmp_path),
                 "--result-filename", "r.json", "--metadata", "machine=here", "--num-warmups", "2",
                 "--goodput", "ttft:1000", "--percentile-metrics", "ttft,e2el",
                 "--metric-percentiles", "50,99", "--request-rate", "100",
                 "--temperature", "0"]  # fmt: skip
        assert main(["bench", "serve", *WORKLOAD, *words]) == 0
    bodies = [body for method, _, _, body in server.requests if method == "POST"]
    assert len(bodies) == 7
    assert {len(body["prompt"]) for body in bodies} == {9}
    assert {body["temperature"] for body in bodies} == {0}
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["completed"], result["total_output_tokens"]) == (5, 20)
    assert (result["model_id"], result["machine"], result["request_rate"]) == ("m", "here", 100.0)
    assert {"mean_ttft_ms", "p50_ttft_ms", "p99_e2el_ms", "request_goodput"} <= set(result)
    assert "ttfts" not in result
    shown = capsys.readouterr().out
    assert "Serving Benchmark Result" in shown
    assert "P50 E2EL" in shown


class Vocabulary:
    vocab_size = 20

    def decode(self, ids, **_):
        return " ".join(map(str, ids))


def test_serve_over_chat_sends_text(monkeypatch, tmp_path):
    monkeypatch.setattr("dovetail.core.tokenizer.load_tokenizer", lambda path: Vocabulary())
    monkeypatch.chdir(tmp_path)
    with running(answers) as server:
        words = ["--base-url", server.url, "--backend", "openai-chat", "--save-detailed"]
        assert main(["bench", "serve", *WORKLOAD, *words, "--max-concurrency", "2"]) == 0
    assert server.peak <= 2
    message = server.requests[-1][3]["messages"][0]
    assert len(message["content"].split()) == 9
    (file,) = tmp_path.glob("openai-chat-infqps-concurrency2-m-*.json")
    assert len(json.loads(file.read_text())["ttfts"]) == 5


def test_serve_with_requests_that_fail(monkeypatch, capsys):
    monkeypatch.setattr("dovetail.core.tokenizer.load_tokenizer", lambda path: Vocabulary())

    def refuse(method, path, body):
        return answers(method, path, body) if method == "GET" else (429, {"error": "full"})

    with running(refuse) as server:
        assert main(["bench", "serve", *WORKLOAD, "--base-url", server.url]) == 1
    err = capsys.readouterr().err
    assert err.count("a request failed: status 429: full") == 3


@pytest.mark.parametrize(
    ("words", "message", "status"),
    [
        (["--goodput", "fast"], "goodput limits look like", 1),
        (["--percentile-metrics", "speed"], "there is no 'speed'", 2),
        (["--metric-percentiles", "101"], "numbers from 0 to 100", 2),
        (["--ready-check-timeout-sec", "0", "--port", "9"], "127.0.0.1:9 cannot be reached", 1),
    ],
)
def test_serve_wrong_wishes(capsys, words, message, status):
    assert main(["bench", "serve", *words]) == status
    assert message in capsys.readouterr().err


def test_serve_without_a_tokenizer(capsys):
    def unknown(method, path, body):
        return (200, {"data": [{"id": "/no/such/folder"}]})

    with running(unknown) as server:
        assert main(["bench", "serve", *WORKLOAD, "--base-url", server.url]) == 2
    assert "tokenizer is not here" in capsys.readouterr().err
