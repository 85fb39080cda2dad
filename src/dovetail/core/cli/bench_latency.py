"""``dovetail bench latency``: seconds that one batch takes from its start to its end."""

from __future__ import annotations

import argparse
import time
from typing import Any

from dovetail.core.cli.arguments import add_engine_arguments, engine_config
from dovetail.core.cli.bench import number, write_json
from dovetail.core.cli.config_file import add_config_argument
from dovetail.core.cli.console import Progress, emit
from dovetail.core.cli.offline import start_offline
from dovetail.core.cli.parser import Parser

__all__ = ["add_arguments", "latency_result", "run"]

_PERCENTILES = (10, 25, 50, 75, 90, 99)


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    for flag, default, least, text in (
        ("--input-len", 32, 1, "Tokens per prompt."),
        ("--output-len", 128, 1, "Tokens per answer."),
        ("--batch-size", 8, 1, "Prompts at once."),
        ("--num-iters-warmup", 10, 0, "Batches before the measurement."),
        ("--num-iters", 30, 1, "Batches that are measured."),
    ):
        parser.add_argument(
            flag,
            type=number(flag, least),
            default=default,
            metavar="N",
            help=f"{text} Default: {default}.",
        )
    parser.add_argument("--output-json", metavar="FILE", help="Write the result as JSON.")
    parser.add_argument(
        "--disable-detokenize", action="store_true", help="Leave the time for text out."
    )
    add_config_argument(parser)
    add_engine_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    import numpy as np

    from dovetail.core.bench.report import table
    from dovetail.core.bench.workloads import Lengths, random_samples

    config = engine_config(namespace)
    offline = start_offline(config, with_tokenizer=False)
    lengths = Lengths(input_len=namespace.input_len, output_len=namespace.output_len)
    rng = np.random.default_rng(config.seed)
    detokenize = not (namespace.disable_detokenize or config.skip_tokenizer_init)
    progress = Progress()
    latencies: list[float] = []
    for index in range(namespace.num_iters_warmup + namespace.num_iters):
        # New prompts each time: the same ones would be found in the prefix cache.
        samples = random_samples(namespace.batch_size, lengths, offline.vocab_size, rng)
        warming = index < namespace.num_iters_warmup
        progress.show(f"{'warming up' if warming else 'measuring'} {index + 1}")
        start = time.perf_counter()
        offline.generate(samples, 1.0, detokenize=detokenize)
        if not warming:
            latencies.append(time.perf_counter() - start)
    progress.clear()
    result = latency_result(latencies)
    emit(table("Batch Latency", _rows(result)))
    if namespace.output_json:
        write_json(namespace.output_json, result)
    return 0


def latency_result(latencies: list[float]) -> dict[str, Any]:
    """The result in seconds, under the keys of ``vllm bench latency``."""
    import numpy as np

    return {
        "avg_latency": float(np.mean(latencies)),
        "latencies": latencies,
        "percentiles": {str(p): float(np.percentile(latencies, p)) for p in _PERCENTILES},
    }


def _rows(result: dict[str, Any]) -> list[tuple[str, Any]]:
    rows = [("Mean latency (ms):", result["avg_latency"] * 1000)]
    rows += [(f"P{p} latency (ms):", v * 1000) for p, v in result["percentiles"].items()]
    return rows
