"""The figures that Prometheus reads."""

from __future__ import annotations

from typing import Any

import prometheus_client
from prometheus_client.parser import text_string_to_metric_families

from dovetail.core.errors import RequestFailedError
from dovetail.core.server.metrics import Histogram
from tests.core.server.fakes import FakeEngine
from tests.core.server.harness import CHAT, COMPLETIONS, MESSAGES, client_of

VLLM_NAMES = [
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "num_preemptions_total",
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "gpu_prefix_cache_queries_total",
    "gpu_prefix_cache_hits_total",
    "gpu_cache_usage_perc",
    "time_to_first_token_seconds_bucket",
    "inter_token_latency_seconds_bucket",
    "time_per_output_token_seconds_bucket",
    "request_time_per_output_token_seconds_sum",
    "e2e_request_latency_seconds_count",
    "request_prompt_tokens_bucket",
    "request_generation_tokens_bucket",
    "request_params_n_bucket",
    "request_params_max_tokens_bucket",
]


async def scrape(client: Any) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    response = await client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain")
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(response.text)
        for sample in family.samples
    }


def value(samples: Any, metric: str, **labels: str) -> float:
    (found,) = [
        v for (n, given), v in samples.items() if n == metric and labels.items() <= set(given)
    ]
    return float(found)


async def test_vllms_names_under_both_prefixes() -> None:
    engine = FakeEngine()
    async with client_of(engine) as client:
        await client.post(COMPLETIONS, json={"prompt": "x", "max_tokens": 3})
        samples = await scrape(client)
    names = {name for name, _ in samples}
    for name in VLLM_NAMES:
        assert {f"vllm:{name}", f"dovetail:{name}"} <= names, name
    for name, labels in samples:
        if name.startswith("vllm:"):
            assert {"model_name", "engine"} <= {key for key, _ in labels}
    assert value(samples, "vllm:num_requests_running") == 3
    assert value(samples, "vllm:kv_cache_usage_perc") == 0.6
    assert value(samples, "vllm:cache_config_info", block_size="16", num_gpu_blocks="10") == 1
    assert value(samples, "dovetail:engine_state", state="ready") == 1


async def test_requests_are_timed_and_counted() -> None:
    engine = FakeEngine(step_s=0.02)
    async with client_of(engine) as client:
        await client.post(COMPLETIONS, json={"prompt": ["x", "y"], "max_tokens": 4})
        body = {"messages": MESSAGES, "stream": True, "max_tokens": 4}
        await client.post(CHAT, json=body)
        engine.fail_at = {1: RequestFailedError("x")}
        await client.post(CHAT, json=body)
        samples = await scrape(client)
    assert value(samples, "vllm:request_success_total", finished_reason="length") == 3
    assert value(samples, "vllm:request_success_total", finished_reason="error") == 1
    assert value(samples, "vllm:request_success_total", finished_reason="stop") == 0
    assert value(samples, "vllm:time_to_first_token_seconds_count") == 4
    assert value(samples, "vllm:inter_token_latency_seconds_count") == 9
    assert value(samples, "vllm:e2e_request_latency_seconds_count") == 3
    assert 0.15 < value(samples, "vllm:e2e_request_latency_seconds_sum") < 10
    assert value(samples, "vllm:request_generation_tokens_sum") == 13
    assert value(samples, "vllm:request_prompt_tokens_sum") == 2 + 2 + 22 + 22


async def test_http_requests_by_route() -> None:
    async with client_of(FakeEngine()) as client:
        await client.post(COMPLETIONS, json={"prompt": "x"})
        await client.post(COMPLETIONS, json={})
        await client.get("/v1/models/org/model")
        samples = await scrape(client)
    counts = "http_requests_total"
    assert value(samples, counts, handler=COMPLETIONS, method="POST", status="2xx") == 1
    assert value(samples, counts, handler=COMPLETIONS, method="POST", status="4xx") == 1
    assert value(samples, counts, handler="/v1/models/{model:path}") == 1
    assert value(samples, "http_request_duration_seconds_count", handler=COMPLETIONS) == 2


async def test_clients_cannot_add_labels() -> None:
    async with client_of(FakeEngine(), api_keys=("k",), public_paths=("/metrics",)) as client:
        await client.get("/nope")
        await client.request("BREW", "/nope")
        await scrape(client)
        before = await scrape(client)
        for i in range(50):
            headers = {"x-request-id": f"id{i}", "authorization": "Bearer k"}
            await client.request(f"M{i}", f"/path/{i}", headers=headers)
            await client.get(f"/v1/models/m{i}", headers=headers)
            body = {"prompt": "x", "model": f"m{i}", "user": f"u{i}"}
            await client.post(COMPLETIONS, json=body, headers=headers)
        after = await scrape(client)
    fresh = {name for name, _ in set(after) - set(before)}
    assert fresh == {
        "http_requests_total",
        "http_request_duration_seconds_bucket",
        "http_request_duration_seconds_count",
        "http_request_duration_seconds_sum",
    }
    added = [
        dict(labels) for name, labels in set(after) - set(before) if name == "http_requests_total"
    ]
    assert {(one["handler"], one["method"]) for one in added} == {
        (COMPLETIONS, "POST"),
        ("/v1/models/{model:path}", "GET"),
    }


async def test_nothing_is_registered_globally() -> None:
    before = set(prometheus_client.REGISTRY._names_to_collectors)
    async with client_of(FakeEngine()) as one, client_of(FakeEngine()) as two:
        await one.post(COMPLETIONS, json={"prompt": "x"})
        assert value(await scrape(two), "vllm:request_success_total", finished_reason="length") == 0
    assert set(prometheus_client.REGISTRY._names_to_collectors) == before


def test_histogram_buckets_are_cumulative() -> None:
    histogram = Histogram((1.0, 2.0))
    for number in (0.5, 1.0, 1.5, 9.0):
        histogram.observe(number)
    assert histogram.buckets() == [("1.0", 2.0), ("2.0", 3.0), ("+Inf", 4.0)]
    assert histogram.total == 12.0
