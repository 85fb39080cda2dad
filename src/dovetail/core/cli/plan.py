"""``dovetail plan``: whether a model fits, and all that would be chosen. Reads no weights."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

from dovetail.core.cli.arguments import add_engine_arguments, engine_config
from dovetail.core.cli.config_file import add_config_argument
from dovetail.core.cli.console import emit, note
from dovetail.core.cli.parser import Parser, UsageError, checked
from dovetail.core.config.parsers import byte_size, count

if TYPE_CHECKING:
    from dovetail.core.config.schema import EngineConfig
    from dovetail.core.contracts.platform import Platform

__all__ = ["add_arguments", "run"]

_TYPICAL = 1024


def add_arguments(parser: Parser) -> None:
    """Describe the command's flags."""
    parser.add_argument(
        "model_given_first",
        nargs="?",
        metavar="MODEL",
        help="Model folder or hub name, as --model takes. Without it, the bundled model.",
    )
    parser.add_argument("--json", action="store_true", help="Write JSON.")
    parser.add_argument(
        "--memory",
        type=checked("--memory", byte_size),
        metavar="BYTES",
        help="Plan for a device with so much free memory: 16g is 16 x 10^9, 16G is 16 x 2^30. "
        "Default: what the device has free now.",
    )
    parser.add_argument(
        "--typical-len",
        type=checked("--typical-len", count()),
        default=_TYPICAL,
        metavar="TOKENS",
        help=f"Tokens of a typical request, prompt and answer. Default: {_TYPICAL}.",
    )
    add_config_argument(parser)
    add_engine_arguments(parser)


def run(namespace: argparse.Namespace) -> int:
    """Plan; returns 1 if it does not fit."""
    from dovetail.core.config.checkpoint import read_facts
    from dovetail.core.config.env import read_environment, with_environment
    from dovetail.core.config.plan import EnginePlan, plan_engine, remedies
    from dovetail.core.config.plan_report import plan_json, plan_text
    from dovetail.core.contracts.platform import Memory

    environment = read_environment(os.environ)
    intent = with_environment(_without_weights(_intent(namespace)), environment)
    facts = read_facts(intent)
    platform = _platform(intent)
    memory = platform.memory()
    if namespace.memory is not None:
        memory = Memory(free=namespace.memory, total=namespace.memory)

    def again(changed: EngineConfig) -> EnginePlan:
        allow_long = environment.allow_long_max_model_len
        return plan_engine(changed, facts, platform, memory, allow_long=allow_long)

    plan = again(intent)
    fixes = () if plan.fits else remedies(plan, intent, again)
    typical = namespace.typical_len
    if namespace.json:
        emit(plan_json(plan, facts, intent, fixes, typical=typical))
    else:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        emit(plan_text(plan, facts, intent, fixes, typical=typical, colour=colour))
    return 0 if plan.fits else 1


def _intent(namespace: argparse.Namespace) -> EngineConfig:
    """What the flags say; the model may be given without one."""
    config, first = engine_config(namespace), namespace.model_given_first
    if first is None:
        return config
    if config.model not in (None, first):
        raise UsageError(f"two models: {first} and --model {config.model}")
    return replace(config, model=first)


def _without_weights(intent: EngineConfig) -> EngineConfig:
    """The same, where a model that is only on the hub is fetched without its weights."""
    from dovetail.core.config.locate import locate, locate_locally
    from dovetail.core.errors import CheckpointError

    try:
        locate_locally(intent.model)
    except CheckpointError:
        folder = locate(intent.model, tokenizer_only=True)
        note(f"{intent.model} is not here: planned from its config, the weights stay on the hub.")
        return replace(intent, model=str(folder), load_format="dummy")
    return intent


def _platform(intent: EngineConfig) -> Platform:
    """The platform that would be chosen, made in this process, and why it is that one."""
    from dovetail.core.plugins.selection import environment, load_platform, select_platform

    selection = select_platform(intent.device, os.environ)
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    for name, value in environment(selection.name, os.environ).items():
        os.environ.setdefault(name, value)
    note(f"device {selection.name} ({selection.reason})")
    return load_platform(selection.name, os.environ)
