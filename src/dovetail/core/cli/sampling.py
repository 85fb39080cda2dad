"""Flags for how tokens are chosen."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from dovetail.core.cli.parser import Parser

if TYPE_CHECKING:
    from dovetail.core.request import SamplingParams

__all__ = ["add_sampling_arguments", "given_sampling", "sampling_params"]

_FLAGS: tuple[tuple[str, Any, str], ...] = (
    ("max_tokens", int, "The most tokens of an answer."),
    ("temperature", float, "0 takes the likeliest token; larger values vary more."),
    ("top_p", float, "Keep the likeliest tokens whose probabilities sum to this, in (0, 1]."),
    ("top_k", int, "Keep this many of the likeliest tokens; 0 keeps all."),
    ("min_p", float, "Drop tokens less likely than this fraction of the likeliest one."),
    ("presence_penalty", float, "Lowers tokens that the answer already holds, in [-2, 2]."),
    ("frequency_penalty", float, "Lowers tokens by how often the answer holds them, in [-2, 2]."),
    ("repetition_penalty", float, "Divides the logits of tokens that came before; 1 is off."),
)
_PREFIX = "sampling:"


def add_sampling_arguments(parser: Parser) -> None:
    """Add a flag for each common field of ``SamplingParams``; those not given leave no trace."""
    group = parser.add_argument_group("Sampling")
    for name, kind, text in _FLAGS:
        group.add_argument(
            "--" + name.replace("_", "-"),
            dest=_PREFIX + name,
            type=kind,
            metavar="N",
            default=argparse.SUPPRESS,
            help=f"{text} Default: the model's.",
        )
    group.add_argument(
        "--stop",
        dest=_PREFIX + "stop",
        action="append",
        metavar="TEXT",
        default=argparse.SUPPRESS,
        help="Ends the answer when it holds this text; may be given several times.",
    )


def given_sampling(namespace: argparse.Namespace) -> dict[str, Any]:
    """The fields that were given on the command line.

    The engine's own ``--seed`` is the seed of what is asked here, too: the same words again.
    """
    given = {
        name.removeprefix(_PREFIX): value
        for name, value in vars(namespace).items()
        if name.startswith(_PREFIX)
    }
    return given | ({"seed": int(namespace.seed)} if "seed" in namespace else {})


def sampling_params(
    namespace: argparse.Namespace, defaults: SamplingParams, *, max_tokens: int, **fixed: Any
) -> SamplingParams:
    """What was given, over the model's own defaults.

    Args:
        namespace: The parsed flags.
        defaults: Of the model.
        max_tokens: The limit where neither the flags nor the model name one.
        fixed: Fields that the command decides.

    Raises:
        RequestError: A value is not allowed; names the field.
    """
    import msgspec

    from dovetail.core.request import SamplingParams

    params = msgspec.structs.asdict(defaults)
    if defaults.max_tokens == SamplingParams().max_tokens:
        params["max_tokens"] = max_tokens
    return SamplingParams(**{**params, **given_sampling(namespace), **fixed})
