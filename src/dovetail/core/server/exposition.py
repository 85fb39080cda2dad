"""Writes the metrics in Prometheus' text form."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from dovetail.core.engine.api import EngineStats

if TYPE_CHECKING:
    from dovetail.core.server.context import Context

__all__ = ["MetricsCollector", "new_registry"]

PREFIXES = ("dovetail:", "vllm:")
_LABELS = ("model_name", "engine")
_STATES = ("loading", "ready", "draining", "restarting", "dead")


def new_registry(context: Context) -> CollectorRegistry:
    """A registry of this server's metrics alone; nothing is registered globally."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(MetricsCollector(context))
    ProcessCollector(registry=registry)
    return registry


class MetricsCollector(Collector):
    """Reads the engine's figures and the server's own when Prometheus asks."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._labels = (context.metrics.model_name, context.metrics.engine)
        self._itl = context.metrics.itl

    def describe(self) -> list[Metric]:
        """Nothing: names are known when they are collected."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Every metric as it stands now."""
        stats = self._context.client.stats
        for prefix in PREFIXES:
            yield from self._gauges(prefix, stats)
            yield from self._counters(prefix, stats)
            yield from self._histograms(prefix)
        yield from self._http()

    def _gauges(self, prefix: str, stats: EngineStats) -> Iterator[Metric]:
        used = 1 - stats.num_free_blocks / stats.num_blocks if stats.num_blocks else 0.0
        hits, queries = stats.prefix_cache_hits, stats.prefix_cache_queries
        for name, text, value in (
            ("num_requests_running", "Requests in the running batch.", stats.num_running),
            ("num_requests_waiting", "Requests waiting to be scheduled.", stats.num_waiting),
            ("kv_cache_usage_perc", "Used part of the KV cache, 0 to 1.", used),
            ("gpu_cache_usage_perc", "The same, under its older name.", used),
            ("gpu_prefix_cache_hit_rate", "Found part of prompt tokens.", hits / (queries or 1)),
        ):
            family = GaugeMetricFamily(prefix + name, text, labels=_LABELS)
            family.add_metric(self._labels, float(value))
            yield family
        yield self._cache_config(prefix, stats)
        state = self._context.client.status.state
        family = GaugeMetricFamily(
            f"{prefix}engine_state", "1 for the state.", labels=(*_LABELS, "state")
        )
        for name in _STATES:
            family.add_metric((*self._labels, name), float(name == state))
        yield family

    def _cache_config(self, prefix: str, stats: EngineStats) -> Metric:
        family = GaugeMetricFamily(
            f"{prefix}cache_config_info",
            "Shape of the KV cache.",
            labels=(*_LABELS, "block_size", "num_gpu_blocks"),
        )
        family.add_metric((*self._labels, str(stats.block_size), str(stats.num_blocks)), 1.0)
        return family

    def _counters(self, prefix: str, stats: EngineStats) -> Iterator[Metric]:
        hits, queries = stats.prefix_cache_hits, stats.prefix_cache_queries
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens processed.", stats.num_prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.num_generation_tokens),
            ("num_preemptions", "Requests set back for lack of KV blocks.", stats.num_preemptions),
            ("prefix_cache_queries", "Prompt tokens looked up.", queries),
            ("prefix_cache_hits", "Prompt tokens found.", hits),
            ("gpu_prefix_cache_queries", "Prompt tokens looked up; older name.", queries),
            ("gpu_prefix_cache_hits", "Prompt tokens found; older name.", hits),
            ("spec_decode_num_drafts", "Times that tokens were guessed.", stats.num_drafts),
            ("spec_decode_num_draft_tokens", "Tokens guessed.", stats.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "Right guesses.", stats.num_accepted_tokens),
            ("engine_steps", "Steps of the engine.", stats.num_steps),
            ("engine_restarts", "Times the engine was brought back.", stats.num_restarts),
        ):
            family = CounterMetricFamily(prefix + name, text, labels=_LABELS)
            family.add_metric(self._labels, float(value))
            yield family
        family = CounterMetricFamily(
            f"{prefix}request_success",
            "Completions that ended, by reason.",
            labels=(*_LABELS, "finished_reason"),
        )
        for reason, count in self._context.metrics.finished.items():
            family.add_metric((*self._labels, reason), float(count))
        yield family

    def _histograms(self, prefix: str) -> Iterator[Metric]:
        for name, (text, histogram) in self._context.metrics.histograms.items():
            older = ("time_per_output_token_seconds",) if histogram is self._itl else ()
            for each in (name, *older):
                family = HistogramMetricFamily(prefix + each, text, labels=_LABELS)
                family.add_metric(self._labels, histogram.buckets(), histogram.total)
                yield family

    def _http(self) -> Iterator[Metric]:
        metrics = self._context.metrics
        requests = CounterMetricFamily(
            "http_requests", "HTTP requests.", labels=("handler", "method", "status")
        )
        for labels, count in metrics.http_requests.items():
            requests.add_metric(labels, float(count))
        yield requests
        duration = HistogramMetricFamily(
            "http_request_duration_seconds", "Time to the end of the answer.", labels=("handler",)
        )
        for handler, histogram in metrics.http_duration.items():
            duration.add_metric((handler,), histogram.buckets(), histogram.total)
        yield duration
