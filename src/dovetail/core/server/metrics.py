"""Counters and histograms for Prometheus, under our names and under vLLM's.

Everything is counted once, in plain Python, on the event loop; ``MetricsCollector`` writes it
out twice, as ``dovetail:x`` and ``vllm:x``, so that existing dashboards and routers keep working.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter

from dovetail.core.engine.api import RequestDelta

__all__ = ["ARRIVAL", "FINISH_REASONS", "Histogram", "Metrics", "RequestRecord"]

FINISH_REASONS = ("stop", "length", "abort", "error", "timeout")
ARRIVAL = "dovetail.arrival"
"""Scope key of when a request came, on ``time.perf_counter``."""
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"})

_SECONDS = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0)
_TTFT = (*_SECONDS, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0)
_ITL = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0)
_E2E = (0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0)
_TOKENS = tuple(float(m * 10**e) for e in range(6) for m in (1, 2, 5))
_HTTP = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 60.0)


class Histogram:
    """Counts of values by bucket; a tenth of the cost of prometheus_client's, without a lock."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds with cumulative counts, as Prometheus wants them."""
        result, seen = [], 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            seen += count
            result.append((str(bound), float(seen)))
        return result


class Metrics:
    """What one server has counted. All methods belong to the server's event loop."""

    def __init__(self, model_name: str, engine: str = "0") -> None:
        self.model_name = model_name
        self.engine = engine
        self.finished: Counter[str] = Counter(dict.fromkeys(FINISH_REASONS, 0))
        self.http_requests: Counter[tuple[str, str, str]] = Counter()
        self.http_duration: dict[str, Histogram] = {}
        self.histograms: dict[str, tuple[str, Histogram]] = {
            "time_to_first_token_seconds": ("From arrival to the first token.", Histogram(_TTFT)),
            "inter_token_latency_seconds": ("Between two messages of tokens.", Histogram(_ITL)),
            "request_time_per_output_token_seconds": (
                "Mean time of a request's tokens after the first.",
                Histogram(_ITL),
            ),
            "e2e_request_latency_seconds": ("From arrival to the last token.", Histogram(_E2E)),
            "request_prompt_tokens": ("Tokens of a prompt.", Histogram(_TOKENS)),
            "request_generation_tokens": ("Tokens generated for a prompt.", Histogram(_TOKENS)),
            "request_params_n": ("Completions asked for.", Histogram((1.0, 2.0, 5.0, 10.0, 20.0))),
            "request_params_max_tokens": ("Most tokens asked for.", Histogram(_TOKENS)),
        }
        self.ttft = self.histograms["time_to_first_token_seconds"][1]
        self.itl = self.histograms["inter_token_latency_seconds"][1]

    def observe(self, name: str, value: float) -> None:
        """Count one value in the histogram ``name``."""
        self.histograms[name][1].observe(value)

    def count_http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """Count one HTTP request. ``handler`` is a route, never a path that a client made up."""
        method = method if method in METHODS else "other"
        self.http_requests[handler, method, f"{status // 100}xx"] += 1
        if handler not in self.http_duration:
            self.http_duration[handler] = Histogram(_HTTP)
        self.http_duration[handler].observe(seconds)


class RequestRecord:
    """Times one prompt from its arrival to its end."""

    __slots__ = ("_arrival", "_first", "_last", "_metrics", "_num_tokens")

    def __init__(
        self, metrics: Metrics, arrival: float, num_prompt_tokens: int, n: int, max_tokens: int
    ) -> None:
        self._metrics = metrics
        self._arrival = arrival
        self._first = self._last = 0.0
        self._num_tokens = 0
        metrics.observe("request_prompt_tokens", num_prompt_tokens)
        metrics.observe("request_params_n", n)
        metrics.observe("request_params_max_tokens", max_tokens)

    def delta(self, delta: RequestDelta) -> None:
        """Count what came."""
        now = time.perf_counter()
        for completion in delta.completions:
            self._num_tokens += len(completion.token_ids)
            if completion.finish_reason is not None:
                self._finished(completion.finish_reason)
        if self._first:
            self._metrics.itl.observe(now - self._last)
        else:
            self._first = now
            self._metrics.ttft.observe(now - self._arrival)
        self._last = now

    def _finished(self, reason: str) -> None:
        self._metrics.finished[reason if reason in FINISH_REASONS else "error"] += 1

    def end(self, outcome: str) -> None:
        """Close the books: ``outcome`` is ``done``, ``abort``, ``error`` or ``timeout``."""
        metrics = self._metrics
        metrics.observe("request_generation_tokens", self._num_tokens)
        if outcome != "done":
            self._finished(outcome)
            return
        metrics.observe("e2e_request_latency_seconds", time.perf_counter() - self._arrival)
        if self._num_tokens > 1:
            mean = (self._last - self._first) / (self._num_tokens - 1)
            metrics.observe("request_time_per_output_token_seconds", mean)
