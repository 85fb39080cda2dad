"""Results as people read them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.core.bench.metrics import METRICS, percentile_key

__all__ = ["serve_report", "table"]

_WIDTH = 50
_LABEL = 40


def table(title: str, rows: Sequence[tuple[str, Any]]) -> str:
    """A heading and one line per row; fractions get two digits."""
    lines = [f" {title} ".center(_WIDTH, "=")]
    lines += [_row(label, value) for label, value in rows]
    return "\n".join([*lines, "=" * _WIDTH])


def serve_report(
    result: Mapping[str, Any],
    *,
    metrics: Sequence[str],
    percentiles: Sequence[float],
) -> str:
    """The result of :func:`summarise` in the layout of ``vllm bench serve``."""
    lines = [" Serving Benchmark Result ".center(_WIDTH, "=")]
    for label, key in (
        ("Successful requests:", "completed"),
        ("Failed requests:", "failed"),
        ("Benchmark duration (s):", "duration"),
        ("Total input tokens:", "total_input_tokens"),
        ("Total generated tokens:", "total_output_tokens"),
        ("Request throughput (req/s):", "request_throughput"),
        ("Request goodput (req/s):", "request_goodput"),
        ("Output token throughput (tok/s):", "output_throughput"),
        ("Peak output token throughput (tok/s):", "max_output_tokens_per_s"),
        ("Peak concurrent requests:", "max_concurrent_requests"),
        ("Total token throughput (tok/s):", "total_token_throughput"),
    ):
        if result.get(key) is not None:
            lines.append(_row(label, result[key]))
    for name in metrics:
        lines.append(METRICS[name].center(_WIDTH, "-"))
        for key in ("mean", "median", *map(percentile_key, percentiles)):
            lines.append(
                _row(f"{key.capitalize()} {name.upper()} (ms):", result[f"{key}_{name}_ms"])
            )
    return "\n".join([*lines, "=" * _WIDTH])


def _row(label: str, value: Any) -> str:
    return (
        f"{label:<{_LABEL}} {value:.2f}"
        if isinstance(value, float)
        else f"{label:<{_LABEL}} {value}"
    )
