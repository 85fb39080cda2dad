"""``dovetail bench latency``: seconds that one batch takes, or milliseconds between tokens."""

from __future__ import annotations

import argparse
import time
from typing import Any

from dovetail.core.cli.arguments import add_engine_arguments, engine_config
from dovetail.core.cli.bench import add_roofline_argument, number, write_json
from dovetail.core.cli.config_file import add_config_argument
from dovetail.core.cli.console import Progress, emit
from dovetail.core.cli.offline import start_offline
from dovetail.core.cli.parser import Parser, UsageError, checked

__all__ = ["add_arguments", "latency_result", "run"]

_PERCENTILES = (10, 25, 50, 75, 90, 99)
_DEFAULTS = {"input_len": 32, "batch_size": 8, "num_iters_warmup": 10, "num_iters": 30}
_FIT_DEFAULTS = {"batch_size": 1, "num_iters_warmup": 1, "num_iters": 3}


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""

    def add(flag: str, least: int, text: str, **more: Any) -> None:
        parser.add_argument(flag, type=number(flag, least), metavar="N", help=text, **more)

    add("--input-len", 1, "Tokens per prompt. Default: 32.")
    add("--output-len", 1, "Tokens per answer. Default: 128.", default=128)
    add("--batch-size", 1, "Prompts at once. Default: 8; with --fit, 1, and a size that is given "
        "is measured beside it.")  # fmt: skip
    add("--num-iters-warmup", 0, "Batches before the measurement. Default: 10; with --fit, 1 for "
        "each length.")  # fmt: skip
    add("--num-iters", 1, "Batches that are measured. Default: 30; with --fit, 3 for each length.")
    parser.add_argument("--output-json", metavar="FILE", help="Write the result as JSON.")
    parser.add_argument(
        "--disable-detokenize", action="store_true", help="Leave the time for text out."
    )
    _add_fit_arguments(parser)
    add_config_argument(parser)
    add_engine_arguments(parser)


def _add_fit_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--fit",
        action="store_true",
        help="Measure the time between tokens at several lengths of the context, and show it as a "
        "line: ITL = a + b x context.",
    )
    parser.add_argument(
        "--context-lens",
        type=checked("--context-lens", _lengths),
        metavar="LIST",
        help="With --fit: prompt lengths to measure at, separated by commas. Default: five, up to "
        "8192 tokens or what fits.",
    )
    parser.add_argument(
        "--plot", metavar="FILE.svg", help="With --fit: draw points, line and roofline as SVG."
    )
    add_roofline_argument(parser, "With --fit: ")


def run(namespace: argparse.Namespace) -> int:
    """Measure and report; returns the exit status."""
    _check(namespace)
    if namespace.fit:
        from dovetail.core.cli.bench_fit import run_fit

        return run_fit(_with(namespace, _FIT_DEFAULTS))
    return _run_batches(_with(namespace, _DEFAULTS))


def _check(namespace: argparse.Namespace) -> None:
    """Raise UsageError for flags that have no meaning together."""
    if namespace.fit and namespace.input_len is not None:
        raise UsageError("--fit measures several lengths: give --context-lens, not --input-len")
    for field in ("context_lens", "plot"):
        if getattr(namespace, field) is not None and not namespace.fit:
            raise UsageError(f"--{field.replace('_', '-')} needs --fit")


def _with(namespace: argparse.Namespace, defaults: dict[str, int]) -> argparse.Namespace:
    given = vars(namespace)
    missing = {name: value for name, value in defaults.items() if given[name] is None}
    return argparse.Namespace(**given | missing)


def _lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts) or len(set(parts)) < 2:
        raise ValueError("two or more different lengths, separated by commas")
    return sorted({int(part) for part in parts})


def _run_batches(namespace: argparse.Namespace) -> int:
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
