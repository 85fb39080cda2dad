"""From the command line to a command: finding it, running it, and saying what went wrong."""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Sequence

from dovetail.core.cli.console import emit, note, start_logging
from dovetail.core.cli.parser import Parser, UsageError
from dovetail.core.errors import DovetailError, InvariantError

__all__ = ["COMMANDS", "main"]

COMMANDS: dict[str, tuple[str, str]] = {
    "serve": ("dovetail.core.cli.serve", "Serve a model over HTTP, as OpenAI's API does."),
    "generate": ("dovetail.core.cli.generate", "Complete one or several prompts."),
    "chat": ("dovetail.core.cli.chat", "Talk to a model, here or on a server."),
    "bench": ("dovetail.core.cli.bench", "Measure throughput, latency or a server."),
    "platforms": ("dovetail.core.cli.platforms", "Show what hardware can be used, and why not."),
    "doctor": ("dovetail.core.cli.doctor", "Examine the installation, and say what is wrong."),
    "plan": ("dovetail.core.cli.plan", "Show whether a model fits, and what would be chosen."),
    "conformance": ("dovetail.core.cli.conformance", "Check that a platform keeps its contracts."),
    "new-plugin": ("dovetail.core.cli.new_plugin", "Write a package for another kind of hardware."),
}
"""Commands with the module that has ``add_arguments`` and ``run``, and what they do."""

BENCH_COMMANDS: dict[str, tuple[str, str]] = {
    "throughput": (
        "dovetail.core.cli.bench_throughput",
        "Tokens per second of many prompts at once, without a server.",
    ),
    "latency": (
        "dovetail.core.cli.bench_latency",
        "Seconds that one batch takes, or milliseconds between tokens over the context (--fit).",
    ),
    "profile": (
        "dovetail.core.cli.bench_profile",
        "Where the time of a step goes, by class of op, beside what the device could do.",
    ),
    "serve": (
        "dovetail.core.cli.bench_serve",
        "What clients of a running server see: time to first token, time per token, goodput.",
    ),
}

_INTERRUPTED = 130
_FAILED, _USAGE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 0, 1 for errors, 2 for usage, 130 for Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(given)
    except InvariantError:
        raise
    except DovetailError as error:
        note(f"dovetail: error: {' '.join(str(error).split())}")
        return _USAGE if isinstance(error, UsageError) else _FAILED
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone; keep the interpreter from flushing into it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _FAILED


def _run(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        emit(_overview("dovetail", COMMANDS), end="")
        return 0 if arguments else _USAGE
    if arguments[0] in ("-V", "--version", "version"):
        emit(f"dovetail {_version()}")
        return 0
    name, *rest = arguments
    if name != "bench":
        return _run_command(f"dovetail {name}", _find(name, COMMANDS, "dovetail"), rest)
    if not rest or rest[0] in ("-h", "--help"):
        emit(_overview("dovetail bench", BENCH_COMMANDS), end="")
        return 0 if rest else _USAGE
    command = _find(rest[0], BENCH_COMMANDS, "dovetail bench")
    return _run_command(f"dovetail bench {rest[0]}", command, rest[1:])


def _find(name: str, commands: dict[str, tuple[str, str]], prog: str) -> tuple[str, str]:
    if name in commands:
        return commands[name]
    close = difflib.get_close_matches(name, commands, n=1, cutoff=0.5)
    hint = f"did you mean `{prog} {close[0]}`?" if close else f"there are {', '.join(commands)}"
    what = "flag" if name.startswith("-") else "command"
    raise UsageError(f"unknown {what} {name!r}; {hint}")


def _run_command(prog: str, command: tuple[str, str], arguments: list[str]) -> int:
    from dovetail.core.cli.config_file import with_config_file
    from dovetail.core.cli.parser import with_dashes

    module = importlib.import_module(command[0])
    parser = Parser(prog, command[1])
    module.add_arguments(parser)
    namespace = parser.parse(with_config_file(parser, with_dashes(arguments)))
    if namespace is None:
        return 0
    start_logging(getattr(namespace, "log_level", "info"))
    status: int = module.run(namespace)
    return status


def _overview(prog: str, commands: dict[str, tuple[str, str]]) -> str:
    lines = [f"usage: {prog} COMMAND [flags]\n", "commands:"]
    lines += [f"  {name:<12}{text}" for name, (_, text) in commands.items()]
    lines.append(f"\n`{prog} COMMAND --help` shows the flags of a command.")
    if prog == "dovetail":
        lines.append("Without --model, every command uses the small bundled model.")
        lines.append("`dovetail --version` shows the version.")
    return "\n".join(lines) + "\n"


def _version() -> str:
    from importlib.metadata import version

    return version("dovetail")
