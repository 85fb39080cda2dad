"""What the ``dovetail bench`` commands share: workload flags, and where results go."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dovetail.core.cli.console import note
from dovetail.core.cli.parser import Parser, UsageError, checked
from dovetail.core.config.parsers import count
from dovetail.core.errors import ConfigError

if TYPE_CHECKING:
    from dovetail.core.bench.workloads import Sample
    from dovetail.core.tokenizer import Tokenizer

__all__ = ["add_workload_arguments", "draw_samples", "number", "percentile_list", "write_json"]

_DATASETS = ("random", "sharegpt", "prefix_repetition")


def number(name: str, least: int = 1) -> Any:
    """A ``type`` for argparse: a whole number of at least ``least``."""
    return checked(name, count(least))


def add_workload_arguments(parser: Parser, *, num_prompts: int = 1000) -> None:
    """Flags that say which requests are made."""
    group = parser.add_argument_group("Workload")

    def add(flags: str, least: int | None, default: Any, text: str, **more: Any) -> None:
        if least is not None:
            more |= {"type": number(flags.split()[0], least), "metavar": "N"}
        shown = "" if default is None else f" Default: {default}."
        group.add_argument(*flags.split(), default=default, help=text + shown, **more)

    add("--dataset-name", None, "random", "Kind of prompts.", choices=_DATASETS)
    add("--dataset-path", None, None, "File with conversations, for sharegpt.", metavar="FILE")
    add("--num-prompts", 1, num_prompts, "Number of requests.")
    add("--input-len --random-input-len", 1, 1024, "Tokens per random prompt.")
    add("--output-len --random-output-len", 1, None, "Tokens per answer. Default: 128; for"
        " sharegpt, as in the file.")  # fmt: skip
    group.add_argument(
        "--range-ratio",
        "--random-range-ratio",
        type=float,
        default=0.0,
        metavar="R",
        help="Random lengths vary by this share of their mean, in [0, 1). Default: 0.",
    )
    add("--random-prefix-len", 0, 0, "Tokens that all random prompts begin with, on top.")
    add("--prefix-repetition-num-prefixes", 1, 10, "Different prefixes.")
    add("--prefix-repetition-prefix-len", 1, 256, "Tokens per prefix.")
    add("--prefix-repetition-suffix-len", 1, 256, "Tokens after the prefix.")
    group.add_argument("--disable-shuffle", action="store_true", help="Keep the file's order.")


def needs_tokenizer(namespace: argparse.Namespace) -> bool:
    """Whether the workload is text."""
    return bool(namespace.dataset_name == "sharegpt")


def draw_samples(
    namespace: argparse.Namespace, *, vocab_size: int, tokenizer: Tokenizer | None, seed: int
) -> list[Sample]:
    """The requests that the flags describe; the same for the same seed."""
    import numpy as np

    from dovetail.core.bench import workloads

    rng = np.random.default_rng(seed)
    output_len = namespace.output_len or 128
    if namespace.dataset_name == "sharegpt":
        if namespace.dataset_path is None or tokenizer is None:
            raise UsageError("--dataset-name sharegpt needs --dataset-path FILE and a tokenizer")
        return workloads.sharegpt_samples(
            Path(namespace.dataset_path),
            namespace.num_prompts,
            tokenizer,
            rng,
            output_len=namespace.output_len,
            shuffle=not namespace.disable_shuffle,
        )
    if namespace.dataset_name == "prefix_repetition":
        return workloads.prefix_repetition_samples(
            namespace.num_prompts,
            num_prefixes=namespace.prefix_repetition_num_prefixes,
            prefix_len=namespace.prefix_repetition_prefix_len,
            suffix_len=namespace.prefix_repetition_suffix_len,
            output_len=output_len,
            vocab_size=vocab_size,
            rng=rng,
        )
    lengths = workloads.Lengths(
        input_len=namespace.input_len,
        output_len=output_len,
        range_ratio=namespace.range_ratio,
        prefix_len=namespace.random_prefix_len,
    )
    return workloads.random_samples(namespace.num_prompts, lengths, vocab_size, rng)


def percentile_list(text: str) -> list[float]:
    """Percentiles from ``50,99``."""
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [-1.0]
    if not all(0 <= value <= 100 for value in values):
        raise ValueError("numbers from 0 to 100, separated by commas")
    return values


def write_json(file: str | Path, result: Mapping[str, Any]) -> None:
    """Keep a result. Raises ConfigError if the file cannot be written."""
    path = Path(file)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
    note(f"Result written to {path}")
