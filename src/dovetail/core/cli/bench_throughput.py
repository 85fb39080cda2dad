"""``dovetail bench throughput``: tokens per second of many prompts at once, without a server."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dovetail.core.cli.arguments import add_engine_arguments, engine_config
from dovetail.core.cli.bench import (
    add_named_workloads,
    add_roofline_argument,
    add_workload_arguments,
    draw_samples,
    named_workload,
    needs_tokenizer,
    with_defaults,
    write_json,
)
from dovetail.core.cli.config_file import add_config_argument
from dovetail.core.cli.console import emit, note
from dovetail.core.cli.offline import Offline, start_offline
from dovetail.core.cli.parser import Parser

if TYPE_CHECKING:
    from dovetail.core.bench.workloads import Sample

__all__ = ["add_arguments", "measure", "run"]

_ROWS = (
    ("Requests:", "num_requests", 1),
    ("Duration (s):", "elapsed_time", 1),
    ("Input tokens:", "total_input_tokens", 1),
    ("Output tokens:", "total_output_tokens", 1),
    ("Request throughput (req/s):", "requests_per_second", 1),
    ("Output token throughput (tok/s):", "output_tokens_per_second", 1),
    ("Total token throughput (tok/s):", "tokens_per_second", 1),
    ("Steps:", "num_steps", 1),
    ("Host per step, mean (us):", "host_us_mean", 1),
    ("Host per step, P99 (us):", "host_us_p99", 1),
    ("Host's share of the time (%):", "host_share", 100),
    ("Starting steps (%):", "starting_share", 100),
    ("Waiting for their results (%):", "waiting_share", 100),
    ("Memory read (GB/s):", "read_bytes_per_second", 1e-9),
    ("Matrix products (TFLOP/s):", "matrix_flops_per_second", 1e-12),
    ("Roofline (s):", "roofline_seconds", 1),
    ("Roofline (tok/s):", "roofline_tokens_per_second", 1),
    ("Fraction of the roofline (%):", "roofline_fraction", 100),
)
"""Label, key of the result, and factor."""


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    parser.add_argument("--output-json", metavar="FILE", help="Write the result as JSON.")
    parser.add_argument(
        "--disable-detokenize", action="store_true", help="Leave the time for text out."
    )
    parser.add_argument(
        "--temperature", type=float, help="Of the sampling. Default: the named workload's, else 1."
    )
    parser.add_argument(
        "--warmup",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Run a few prompts before the measurement.",
    )
    add_roofline_argument(parser)
    add_config_argument(parser)
    add_named_workloads(parser)
    add_workload_arguments(parser)
    add_engine_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    from dovetail.core.bench.report import table

    named, flags = named_workload(namespace), with_defaults(namespace)
    config = engine_config(namespace)
    offline = start_offline(config, with_tokenizer=needs_tokenizer(flags))
    temperature = flags.temperature
    if named is None:
        samples = draw_samples(
            flags, vocab_size=offline.vocab_size, tokenizer=offline.tokenizer, seed=config.seed
        )
    else:
        count = namespace.num_prompts or named.num_prompts
        samples = named.draw.samples(count, offline.vocab_size, config.seed)
        temperature = named.temperature if temperature is None else temperature
    temperature = 1.0 if temperature is None else temperature
    detokenize = not (namespace.disable_detokenize or config.skip_tokenizer_init)
    if namespace.warmup:
        offline.generate(samples[:4], temperature, detokenize=detokenize)
        offline.llm.reset_prefix_cache()
    result = measure(offline, samples, temperature, detokenize=detokenize)
    if namespace.roofline:
        result |= _roofline(offline, samples, result, shared=_shares_prefixes(flags))
    emit(table("Offline Throughput", _rows(result)))
    if namespace.output_json:
        write_json(namespace.output_json, result)
    return 0


def measure(
    offline: Offline, samples: Sequence[Sample], temperature: float, *, detokenize: bool
) -> dict[str, Any]:
    """The result under the keys of ``vllm bench throughput``, and a few more."""
    offline.meter.clear()
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
        **offline.meter.times.summary(),
    }


def _roofline(
    offline: Offline, samples: Sequence[Sample], result: dict[str, Any], *, shared: bool
) -> dict[str, float]:
    """The bound of the workload, and how near to it the result is; empty without one."""
    if shared and offline.llm.config.enable_prefix_caching:
        note("No roofline: prompts share prefixes, which are not computed again")
        return {}
    roofline = offline.roofline()
    if roofline is None:
        return {}
    seconds = roofline.workload([(sample.prompt_len, sample.output_len) for sample in samples])
    return {
        "read_bytes_per_second": roofline.rates.read_bytes_per_second,
        "matrix_flops_per_second": roofline.rates.matrix_flops_per_second,
        "roofline_seconds": seconds,
        "roofline_tokens_per_second": sum(sample.output_len for sample in samples) / seconds,
        "roofline_fraction": seconds / result["elapsed_time"],
    }


def _shares_prefixes(flags: argparse.Namespace) -> bool:
    """Whether prompts begin alike by design."""
    return bool(flags.dataset_name == "prefix_repetition" or flags.random_prefix_len)


def _rows(result: dict[str, Any]) -> list[tuple[str, Any]]:
    known = [(label, result[key], by) for label, key, by in _ROWS if key in result]
    return [(label, value if by == 1 else value * by) for label, value, by in known]
