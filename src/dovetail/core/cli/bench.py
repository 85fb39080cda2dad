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
    from dovetail.core.bench.named import NamedWorkload
    from dovetail.core.bench.workloads import Sample
    from dovetail.core.tokenizer import Tokenizer

__all__ = [
    "add_named_workloads",
    "add_roofline_argument",
    "add_workload_arguments",
    "draw_samples",
    "named_workload",
    "needs_tokenizer",
    "number",
    "percentile_list",
    "with_defaults",
    "write_json",
    "write_picture",
]

_DATASETS = ("random", "sharegpt", "prefix_repetition")
_GROUP = "Workload"
_NUM_PROMPTS = 1000
_DEFAULTS: dict[str, Any] = {
    "dataset_name": "random",
    "dataset_path": None,
    "input_len": 1024,
    "output_len": None,
    "range_ratio": 0.0,
    "random_prefix_len": 0,
    "prefix_repetition_num_prefixes": 10,
    "prefix_repetition_prefix_len": 256,
    "prefix_repetition_suffix_len": 256,
    "disable_shuffle": False,
}
"""Of the flags that say which requests are made. A named workload says all of that itself."""


def number(name: str, least: int = 1) -> Any:
    """A ``type`` for argparse: a whole number of at least ``least``."""
    return checked(name, count(least))


def add_workload_arguments(parser: Parser) -> None:
    """Flags that say which requests are made."""
    group = parser.add_argument_group(_GROUP)

    def add(flags: str, least: int | None, text: str, **more: Any) -> None:
        names = flags.split()
        if least is not None:
            more |= {"type": number(names[0], least), "metavar": "N"}
        field = names[0].removeprefix("--").replace("-", "_")
        default = _DEFAULTS.get(field)
        shown = "" if default is None or default is False else f" Default: {default}."
        group.add_argument(*names, help=text + shown, **more)

    add("--dataset-name", None, "Kind of prompts.", choices=_DATASETS)
    add("--dataset-path", None, "File with conversations, for sharegpt.", metavar="FILE")
    add("--num-prompts", 1, f"Number of requests. Default: {_NUM_PROMPTS}.")
    add("--input-len --random-input-len", 1, "Tokens per random prompt.")
    add("--output-len --random-output-len", 1, "Tokens per answer. Default: 128; for sharegpt, as"
        " in the file.")  # fmt: skip
    add(
        "--range-ratio --random-range-ratio",
        None,
        "Random lengths vary by this share of their mean, in [0, 1).",
        type=float,
        metavar="R",
    )
    add("--random-prefix-len", 0, "Tokens that all random prompts begin with, on top.")
    add("--prefix-repetition-num-prefixes", 1, "Different prefixes.")
    add("--prefix-repetition-prefix-len", 1, "Tokens per prefix.")
    add("--prefix-repetition-suffix-len", 1, "Tokens after the prefix.")
    add("--disable-shuffle", None, "Keep the file's order.", action="store_true", default=None)


def add_named_workloads(parser: Parser) -> None:
    """The flag that takes a workload by its name."""
    from dovetail.core.bench.named import WORKLOADS

    known = "; ".join(f"{name}: {workload.summary}" for name, workload in WORKLOADS.items())
    parser.add_argument_group("Named workloads").add_argument(
        "--workload",
        choices=tuple(WORKLOADS),
        metavar="NAME",
        help=f"Requests that have a name, in place of the flags for datasets and lengths. {known}."
        " Each has 256 requests, if --num-prompts does not say otherwise.",
    )


def add_roofline_argument(parser: Parser, when: str = "") -> None:
    """The flag that leaves the roofline out; ``when`` begins its help."""
    parser.add_argument(
        "--roofline",
        action=argparse.BooleanOptionalAction,
        default=True,
        help=f"{when}Measure the device's memory and arithmetic, and show the least time that it "
        "would need. Default: on.",
    )


def named_workload(namespace: argparse.Namespace) -> NamedWorkload | None:
    """The workload that was named, if one was.

    Raises:
        UsageError: Lengths or a dataset are given as well.
    """
    from dovetail.core.bench.named import WORKLOADS

    if namespace.workload is None:
        return None
    for field in _DEFAULTS:
        if getattr(namespace, field) is not None:
            raise UsageError(
                f"--workload {namespace.workload} says which requests are made: leave"
                f" --{field.replace('_', '-')} out, or --workload"
            )
    return WORKLOADS[namespace.workload]


def with_defaults(namespace: argparse.Namespace) -> argparse.Namespace:
    """The same, where flags of the workload that were not given have their defaults."""
    given = vars(namespace)
    missing = {name: value for name, value in _DEFAULTS.items() if given[name] is None}
    num_prompts = given["num_prompts"] or _NUM_PROMPTS
    return argparse.Namespace(**given | missing | {"num_prompts": num_prompts})


def needs_tokenizer(namespace: argparse.Namespace) -> bool:
    """Whether the workload is text."""
    return bool(namespace.dataset_name == "sharegpt")


def draw_samples(
    namespace: argparse.Namespace, *, vocab_size: int, tokenizer: Tokenizer | None, seed: int
) -> list[Sample]:
    """The requests that the flags, all of them set, describe; the same for the same seed."""
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
    _write(Path(file), json.dumps(result, indent=2) + "\n", "Result")


def write_picture(file: str | Path, text: str) -> None:
    """Keep an SVG. Raises ConfigError if the file cannot be written."""
    _write(Path(file), text, "Picture")


def _write(path: Path, text: str, what: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error}") from error
    note(f"{what} written to {path}")
