"""What is measured of a server, by the definitions of ``vllm bench serve``.

All times are seconds, all results that end in ``_ms`` milliseconds.

=====  ==========================================================================================
TTFT   first chunk with content, less the time just before the request was sent
ITL    gaps between chunks with content, over all requests; a chunk may hold several tokens
E2EL   last chunk with content, less the time just before the request was sent
TPOT   (E2EL - TTFT) / (tokens - 1), one value per request with more than one token
=====  ==========================================================================================
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dovetail.core.errors import ConfigError

__all__ = [
    "METRICS",
    "Trace",
    "details",
    "parse_goodput",
    "percentile_key",
    "statistics",
    "summarise",
]

METRICS: dict[str, str] = {
    "ttft": "Time to First Token",
    "tpot": "Time per Output Token (excl. 1st token)",
    "itl": "Inter-token Latency",
    "e2el": "End-to-end Latency",
}
"""Measures with their headings."""

_GOODPUT_METRICS = ("ttft", "tpot", "e2el")


@dataclass(kw_only=True)
class Trace:
    """What a client saw of one request. Filled in by the client while the answer comes."""

    prompt_len: int
    """Tokens; the server's own count where it gives one."""
    start_time: float = 0.0
    """Just before the request was sent, on the client's clock."""
    queue_time: float = 0.0
    """Waited in the client, for the limit on requests under way."""
    ttft: float = 0.0
    itls: list[float] = field(default_factory=list)
    latency: float = 0.0
    """E2EL."""
    output_len: int = 0
    """Tokens; the server's own count, else one per chunk."""
    text: str = ""
    success: bool = False
    error: str = ""

    @property
    def tpot(self) -> float | None:
        """Seconds per token after the first; None for answers of one token."""
        if self.output_len < 2:
            return None
        return (self.latency - self.ttft) / (self.output_len - 1)

    @property
    def end_time(self) -> float:
        """When the last content came."""
        return self.start_time + self.latency


def summarise(
    traces: Sequence[Trace],
    duration: float,
    *,
    percentiles: Sequence[float] = (99,),
    metrics: Sequence[str] = ("ttft", "tpot", "itl"),
    goodput: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The result of a run, under the keys of ``vllm bench serve --save-result``.

    Args:
        traces: All requests, failed ones too.
        duration: Seconds from the first request sent to the last one ended.
        percentiles: Each in [0, 100].
        metrics: Which of :data:`METRICS` get mean, median, deviation and percentiles.
        goodput: Limits in milliseconds by metric; a request is good if it keeps all of them.
    """
    done = [trace for trace in traces if trace.success]
    num_input = sum(trace.prompt_len for trace in done)
    num_output = sum(trace.output_len for trace in done)
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(done),
        "failed": len(traces) - len(done),
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "request_throughput": len(done) / duration,
        "request_goodput": _num_good(done, goodput) / duration if goodput else None,
        "output_throughput": num_output / duration,
        "total_token_throughput": (num_input + num_output) / duration,
        "max_output_tokens_per_s": _peak_tokens(done),
        "max_concurrent_requests": _peak_concurrency(done),
    }
    for name in metrics:
        for key, value in statistics(_values(done, name), percentiles).items():
            result[f"{key}_{name}_ms"] = value * 1000
    return result


def details(traces: Sequence[Trace]) -> dict[str, Any]:
    """One entry per request, under the keys of ``vllm bench serve --save-detailed``."""
    return {
        "input_lens": [trace.prompt_len for trace in traces],
        "output_lens": [trace.output_len for trace in traces],
        "ttfts": [trace.ttft for trace in traces],
        "itls": [trace.itls for trace in traces],
        "latencies": [trace.latency for trace in traces],
        "start_times": [trace.start_time for trace in traces],
        "queue_times": [trace.queue_time for trace in traces],
        "generated_texts": [trace.text for trace in traces],
        "errors": [trace.error for trace in traces],
    }


def statistics(values: Sequence[float], percentiles: Sequence[float]) -> dict[str, float]:
    """``mean``, ``median``, ``std`` and ``pNN``, in the unit of the values; 0 without values."""
    known = np.asarray(values if len(values) else [0.0])
    found = {
        "mean": float(known.mean()),
        "median": float(np.median(known)),
        "std": float(known.std()),
    }
    for percentile in percentiles:
        found[percentile_key(percentile)] = float(np.percentile(known, percentile))
    return found


def percentile_key(percentile: float) -> str:
    """``p99`` or ``p99.9``."""
    return f"p{percentile:g}"


def parse_goodput(pairs: Sequence[str]) -> dict[str, float]:
    """Limits in milliseconds by metric, from words such as ``ttft:200``."""
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, limit = pair.partition(":")
        try:
            limits[name] = float(limit)
        except ValueError:
            limits[name] = -1.0
        if name not in _GOODPUT_METRICS or not limits[name] >= 0:
            raise ConfigError(
                f"goodput limits look like ttft:200 tpot:50 e2el:2000 (milliseconds), not {pair!r}"
            )
    return limits


def _values(done: Sequence[Trace], metric: str) -> list[float]:
    if metric == "itl":
        return [gap for trace in done for gap in trace.itls]
    if metric == "tpot":
        return [tpot for trace in done if (tpot := trace.tpot) is not None]
    if metric == "ttft":
        return [trace.ttft for trace in done]
    if metric == "e2el":
        return [trace.latency for trace in done]
    raise ConfigError(f"unknown metric {metric!r}; there are {', '.join(METRICS)}")


def _num_good(done: Sequence[Trace], limits: Mapping[str, float]) -> int:
    """Requests that keep every limit. TPOT counts as 0 where it is undefined."""
    return sum(
        all(
            value * 1000 <= limits[name]
            for name, value in (
                ("ttft", trace.ttft),
                ("tpot", trace.tpot or 0.0),
                ("e2el", trace.latency),
            )
            if name in limits
        )
        for trace in done
    )


def _peak_tokens(done: Sequence[Trace]) -> float:
    """The most tokens in one second, seconds counted from the first request.

    A chunk counts as the mean number of tokens of its answer's chunks.
    """
    if not done:
        return 0.0
    origin = min(trace.start_time for trace in done)
    buckets: dict[int, float] = {}
    for trace in done:
        times = trace.start_time + trace.ttft + np.cumsum([0.0, *trace.itls]) - origin
        for second in times.astype(int).tolist():
            buckets[second] = buckets.get(second, 0.0) + trace.output_len / len(times)
    return max(buckets.values())


def _peak_concurrency(done: Sequence[Trace]) -> int:
    """The most requests under way at one instant; one that ends as another starts is not."""
    events = [(trace.start_time, 1) for trace in done] + [(trace.end_time, -1) for trace in done]
    current = peak = 0
    for _, change in sorted(events):
        current += change
        peak = max(peak, current)
    return peak
