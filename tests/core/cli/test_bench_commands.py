import asyncio
import json
import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

import dovetail
from dovetail.core.bench.named import WORKLOADS
from dovetail.core.cli import main
from dovetail.core.cli.bench_latency import latency_result
from dovetail.core.contracts.platform import Rates
from dovetail.core.request import CompletionOutput, RequestOutput
from dovetail.platforms.null import NullPlatform
from dovetail.platforms.torch.platform import TorchPlatform
from tests.core.bench.servers import DONE, event, scripted


class FakeLLM:
    """Gives as many tokens as are asked for, less what it is told to lack."""

    lack = 0
    calls: list = []  # noqa: RUF012

    def __init__(self, **settings):
        self.settings = settings
        self.cached = []
        self.core = SimpleNamespace(runner=None)
        self.platform = NullPlatform()
        self.config = SimpleNamespace(
            enable_prefix_caching=True, runner_config=lambda: SimpleNamespace(dtype="float32")
        )

    def reset_prefix_cache(self):
        self.cached = []

    def generate(self, prompts, params, *, use_tqdm):
        assert not any(prompt in self.cached for prompt in prompts), "prompts were run before"
        self.cached = prompts
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


NANO = ["bench", "throughput", "--workload", "nano", "--num-prompts", "3"]


def test_named_workloads(llm):
    assert main(NANO) == 0
    prompts, params, _ = llm.calls[-1]
    samples = WORKLOADS["nano"].draw.samples(3, 4096, 0)
    assert [p["prompt_token_ids"] for p in prompts] == [s.token_ids for s in samples]
    assert [p.max_tokens for p in params] == [s.output_len for s in samples]
    assert all(p.ignore_eos and p.temperature == 0.6 for p in params)
    assert main([*NANO, "--temperature", "0"]) == 0
    assert llm.calls[-1][1][0].temperature == 0


@pytest.mark.parametrize(
    "words", [["--input-len", "9"], ["--range-ratio", "0"], ["--dataset-name", "random"]]
)
def test_named_workloads_say_it_all_themselves(llm, capsys, words):
    assert main([*NANO, *words]) == 2
    assert f"leave {words[0]} out, or --workload" in capsys.readouterr().err
    assert not llm.calls


def test_help_lists_the_named_workloads(capsys):
    assert main(["bench", "throughput", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert all(f"{name}: {workload.summary}" in shown for name, workload in WORKLOADS.items())


def test_without_rates_there_is_no_roofline_and_it_says_so(llm, capsys):
    assert main(NANO) == 0
    assert "No roofline: platform null does not measure its device" in capsys.readouterr().err
    assert main([*NANO, "--no-roofline"]) == 0
    assert "No roofline" not in capsys.readouterr().err


def test_prompts_that_share_prefixes_have_no_roofline(llm, capsys):
    words = ["--num-prompts", "2", "--random-prefix-len", "5", "--input-len", "3"]
    assert main(["bench", "throughput", *words]) == 0
    assert "No roofline: prompts share prefixes" in capsys.readouterr().err


@pytest.fixture
def rates(monkeypatch):
    """Of a device that would need a second for a gigabyte."""
    found = Rates(read_bytes_per_second=1e9, matrix_flops_per_second=1e12)
    monkeypatch.setattr(TorchPlatform, "rates", lambda self, dtype: found)
    return found


REFERENCE = ["--device", "reference", "--max-model-len", "256"]


def test_throughput_of_a_real_engine_has_a_roofline_and_the_host_s_share(rates, tmp_path, capsys):
    file = tmp_path / "result.json"
    words = ["--num-prompts", "4", "--input-len", "20", "--output-len", "9", "--output-json"]
    assert main(["bench", "throughput", *REFERENCE, *words, str(file)]) == 0
    result = json.loads(file.read_text())
    assert result["num_steps"] >= 9
    shares = [result[f"{part}_share"] for part in ("host", "starting", "waiting")]
    assert all(share > 0 for share in shares)
    assert sum(shares) == pytest.approx(1)
    assert 0 < result["host_us_mean"] < result["elapsed_time"] / result["num_steps"] * 1e6
    assert result["roofline_fraction"] == result["roofline_seconds"] / result["elapsed_time"]
    # Nine reads of the demonstration model's 9.7 MB, less the embedding's 2.1 MB.
    assert result["roofline_seconds"] == pytest.approx(9 * 7.6e6 / 1e9, rel=0.05)
    shown = capsys.readouterr().out
    assert "Fraction of the roofline (%):" in shown
    assert "Host per step, P99 (us):" in shown


FIT = ["bench", "latency", "--fit", *REFERENCE, "--output-len", "10", "--num-iters", "1",
       "--context-lens", "16,64,200", "--num-iters-warmup", "0"]  # fmt: skip


def test_latency_fit(rates, tmp_path, capsys):
    file, picture = tmp_path / "fit.json", tmp_path / "new" / "fit.svg"
    words = ["--batch-size", "2", "--output-json", str(file), "--plot", str(picture)]
    assert main([*FIT, *words]) == 0
    result = json.loads(file.read_text())
    assert [fit["batch_size"] for fit in result["fits"]] == [1, 2]
    assert result["rates"] == {"read_bytes_per_second": 1e9, "matrix_flops_per_second": 1e12}
    for fit in result["fits"]:
        assert [point["context"] for point in fit["points"]] == [21, 69, 205]
        for point in fit["points"]:
            positions = fit["batch_size"] * point["context"]  # Of 2 KiB each.
            assert point["bound"] == pytest.approx((7.6e6 + positions * 2048) / 1e6, rel=0.01)
        assert fit["host_us_mean"] > 0
        line = [fit["base_ms"] + fit["ms_per_1000_tokens"] * x / 1000 for x in (21, 69, 205)]
        off = [y - p["milliseconds"] for y, p in zip(line, fit["points"], strict=True)]
        assert fit["residual_ms"] == pytest.approx((sum(x * x for x in off) / 3) ** 0.5)
    shown = capsys.readouterr().out
    assert shown.count("ITL = ") == 2
    assert "roofline" in shown
    assert picture.read_text().count("<circle") == 6


def test_latency_fit_without_a_roofline(capsys, tmp_path):
    file = tmp_path / "fit.json"
    assert main([*FIT, "--no-roofline", "--output-json", str(file)]) == 0
    assert "roofline" not in capsys.readouterr().out
    result = json.loads(file.read_text())
    assert result["rates"] is None
    assert result["fits"][0]["points"][0]["bound"] is None


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fit", "--input-len", "9"], "give --context-lens, not --input-len"),
        (["--plot", "x.svg"], "--plot needs --fit"),
        (["--context-lens", "1,2"], "--context-lens needs --fit"),
        (["--fit", "--context-lens", "5,5"], "two or more different lengths"),
        (["--fit", "--output-len", "7"], "--output-len of at least 8"),
        (["--fit", "--speculative-config", '{"method": "ngram", "num_speculative_tokens": 2}'],
         "leave --speculative-config out"),
        ([*FIT[2:], "--context-lens", "16,250"], "the longest prompt here has 246"),
        ([*FIT[2:], "--context-lens", "9,99", "--max-num-seqs", "2", "--batch-size", "4"],
         "(--max-num-seqs)"),
    ],
)  # fmt: skip
def test_latency_wrong_wishes(capsys, words, message):
    assert main(["bench", "latency", *words]) in (1, 2)
    assert message in capsys.readouterr().err


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
