"""``dovetail bench throughput``: tokens per second of many prompts at once, without a server."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dovetail.core.cli.arguments import add_engine_arguments, engine_config
from dovetail.core.cli.bench import (
    add_workload_arguments,
    draw_samples,
    needs_tokenizer,
    write_json,
)
from dovetail.core.cli.config_file import add_config_argument
from dovetail.core.cli.console import emit, note
from dovetail.core.cli.offline import Offline, start_offline
from dovetail.core.cli.parser import Parser

if TYPE_CHECKING:
    from dovetail.core.bench.workloads import Sample

__all__ = ["add_arguments", "measure", "run"]


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    parser.add_argument("--output-json", metavar="FILE", help="Write the result as JSON.")
    parser.add_argument(
        "--disable-detokenize", action="store_true", help="Leave the time for text out."
    )
    parser.add_argument(
        "--temperature", type=float, default=1.0, help="Of the sampling. Default: 1."
    )
    parser.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Run a few prompts before the measurement.",
    )
    add_config_argument(parser)
    add_workload_arguments(parser)
    add_engine_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    from dovetail.core.bench.report import table

    config = engine_config(namespace)
    offline = start_offline(config, with_tokenizer=needs_tokenizer(namespace))
    samples = draw_samples(
        namespace,
        vocab_size=offline.vocab_size,
        tokenizer=offline.tokenizer,
        seed=config.seed,
    )
    detokenize = not (namespace.disable_detokenize or config.skip_tokenizer_init)
    if namespace.warmup:
        offline.generate(samples[:4], namespace.temperature, detokenize=detokenize)
    result = measure(offline, samples, namespace.temperature, detokenize=detokenize)
    emit(table("Offline Throughput", _rows(result)))
    if namespace.output_json:
        write_json(namespace.output_json, result)
    return 0


def measure(
    offline: Offline, samples: Sequence[Sample], temperature: float, *, detokenize: bool
) -> dict[str, Any]:
    """The result under the keys of ``vllm bench throughput``, and a few more."""
    start = time.perf_counter()
    num_output = offline.generate(samples, temperature, detokenize=detokenize, show=True)
    elapsed = time.perf_counter() - start
    num_input = sum(sample.prompt_len for sample in samples)
    wanted = sum(sample.output_len for sample in samples)
    if num_output != wanted:
        note(f"dovetail: warning: {num_output} tokens came back, {wanted} were asked for")
    return {
        "elapsed_time": elapsed,
        "num_requests": len(samples),
        "total_num_tokens": num_input + num_output,
        "requests_per_second": len(samples) / elapsed,
        "tokens_per_second": (num_input + num_output) / elapsed,
        "total_input_tokens": num_input,
        "total_output_tokens": num_output,
        "output_tokens_per_second": num_output / elapsed,
    }


def _rows(result: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        ("Requests:", result["num_requests"]),
        ("Duration (s):", result["elapsed_time"]),
        ("Input tokens:", result["total_input_tokens"]),
        ("Output tokens:", result["total_output_tokens"]),
        ("Request throughput (req/s):", result["requests_per_second"]),
        ("Output token throughput (tok/s):", result["output_tokens_per_second"]),
        ("Total token throughput (tok/s):", result["tokens_per_second"]),
    ]
