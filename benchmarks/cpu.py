"""The CPU, with made-up weights in published shapes, and other engines beside it in the same run.

    python -m benchmarks.cpu --shape qwen0.5b --quantization int8
    python -m benchmarks.cpu --model FOLDER --peer "NAME=/path/python script.py FOLDER bf16"

Each round starts every engine once, in turn, in a process of its own; the next round begins with
another one. A cell of the grid is the best of the repeats of its process, figures are medians over
the rounds, and so is the ratio: of this engine to a peer in the same round. A peer is any command
that prints what ``benchmarks.grid`` prints. Writes ``result.md``, a table ready for
``docs/measurements``, ``result.json``, and ``result.svg``, a picture of the ratios. The exit status
is 0 if every engine ran to its end.

``--shape tiny --rounds 1`` goes through all of it in a moment.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.grid import GRID, Cell, cells
from benchmarks.machine import describe_machine
from benchmarks.processes import Outcome, run
from benchmarks.ratio_plot import ratio_plot
from benchmarks.results import machine_line, rates_text, row, show_report, write_report
from benchmarks.shapes import SHAPES, tiny, write_config

OURS = "dovetail"
TINY = "tiny"
_READY = re.compile(r"ready s ([0-9.]+)")


@dataclass(kw_only=True)
class Reading:
    """What one process said."""

    seconds: dict[Cell, float] = field(default_factory=dict)
    limits: dict[Cell, float] = field(default_factory=dict)
    """The least seconds that the machine needs, if the process knows them."""
    ready: float | None = None
    """Seconds."""
    device: dict[str, Any] = field(default_factory=dict)
    """Its name and rates, if the process measured them."""
    error: str = ""
    """Why it did not come to its end."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A command, and what it said in each round."""

    name: str
    command: Sequence[str]
    readings: list[Reading] = field(default_factory=list)

    def middle(self, value: Callable[[Reading], float | None]) -> float | None:
        """The median over the rounds that have a value; None if none has."""
        return _middle([known for known in map(value, self.readings) if known is not None])

    def speed(self, cell: Cell) -> float | None:
        """Tokens per second."""
        seconds = self.middle(lambda reading: reading.seconds.get(cell))
        return None if seconds is None else cell.tokens / seconds

    def fraction(self, cell: Cell) -> float | None:
        """Of the machine's limit."""
        seconds = self.middle(lambda reading: reading.seconds.get(cell))
        limit = self.middle(lambda reading: reading.limits.get(cell))
        return None if seconds is None or limit is None else limit / seconds


def read(outcome: Outcome) -> Reading:
    """What a process wrote; lines of another form are its own business."""
    reading = Reading()
    for line in outcome.output.splitlines():
        if ready := _READY.fullmatch(line.strip()):
            reading.ready = float(ready[1])
        elif line.startswith("{"):
            _take(reading, line)
    if outcome.timed_out:
        reading.error = f"not over after {outcome.seconds:.0f} s"
    elif outcome.status:
        reading.error = outcome.last_line()
    elif not reading.seconds:
        reading.error = "it printed no line for any cell"
    return reading


def _take(reading: Reading, line: str) -> None:
    try:
        found = json.loads(line)
    except ValueError:
        return
    if {"requests", "prompt", "new", "s"} <= set(found):
        cell = Cell(found["requests"], found["prompt"], found["new"])
        reading.seconds[cell] = found["s"]
        if "limit_s" in found:
            reading.limits[cell] = found["limit_s"]
    elif "read_bytes_per_second" in found:
        reading.device = dict(found)


def run_rounds(engines: Sequence[Engine], rounds: int, limit: float) -> Iterator[int]:
    """Fill in the readings, one of each engine for each round; yields how many rounds are done."""
    for number in range(rounds):
        turn = number % len(engines)
        for engine in (*engines[turn:], *engines[:turn]):
            print(f"round {number + 1} of {rounds}: {engine.name} ... ", end="", flush=True)
            reading, seconds = _round(engine.command, limit)
            engine.readings.append(reading)
            print(reading.error or f"{seconds:.0f} s", flush=True)
        yield number + 1


def _round(command: Sequence[str], limit: float) -> tuple[Reading, float]:
    try:
        outcome = run(command, limit)
    except OSError as error:
        return Reading(error=f"it cannot be started: {error}"), 0.0
    return read(outcome), outcome.seconds


def ratios(ours: Engine, peer: Engine, value: Callable[[Reading], float | None]) -> list[float]:
    """How many times as long a peer takes, in each round that has both."""
    pairs = zip(ours.readings, peer.readings, strict=True)
    known = [(value(a), value(b)) for a, b in pairs]
    return [theirs / own for own, theirs in known if own and theirs]


def _cell_ratios(ours: Engine, peer: Engine, cell: Cell) -> list[float]:
    return ratios(ours, peer, lambda reading: reading.seconds.get(cell))


def report(machine: Mapping[str, str], what: str, engines: Sequence[Engine], grid: Sequence[Cell],
           rounds: int) -> str:  # fmt: skip
    """The table and what belongs to it, in Markdown."""
    ours, *peers = engines
    lines = [
        machine_line(machine),
        *_device(ours),
        f"Model: {what}. Greedy, end-of-text ignored, prefix cache off.",
        "Columns are requests x prompt tokens + new tokens; figures are tokens per second,"
        " new ones, or prompt ones where one token is asked for. A ratio above 1: the peer takes"
        f" longer. Medians; rounds: {rounds}.",
        "",
        row(["", *map(str, grid), "load to ready, s"]),
        "|---" * (len(grid) + 2) + "|",
        *(row([engine.name, *_speeds(engine, grid), _ready(engine)]) for engine in engines),
        *(_ratios(ours, peer, grid) for peer in peers),
        row([f"{ours.name}, of the machine's limit", *_fractions(ours, grid), ""]),
        "",
        *_errors(engines),
        "```",
        *(f"{engine.name}: {shlex.join(engine.command)}" for engine in engines),
        "```",
    ]
    return "\n".join(lines) + "\n"


def _speeds(engine: Engine, grid: Iterable[Cell]) -> list[str]:
    return [_shown(engine.speed(cell), ".1f") for cell in grid]


def _fractions(engine: Engine, grid: Iterable[Cell]) -> list[str]:
    return [_shown(engine.fraction(cell), ".0%") for cell in grid]


def _ready(engine: Engine) -> str:
    return _shown(engine.middle(lambda reading: reading.ready), ".1f")


def _ratios(ours: Engine, peer: Engine, grid: Iterable[Cell]) -> str:
    found = [_cell_ratios(ours, peer, cell) for cell in grid]
    found.append(ratios(ours, peer, lambda reading: reading.ready))
    return row([f"{ours.name} / {peer.name}", *(_shown(_middle(x), ".2f") for x in found)])


def _middle(found: Sequence[float]) -> float | None:
    return median(found) if found else None


def _shown(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _device(ours: Engine) -> list[str]:
    devices = [reading.device for reading in ours.readings if reading.device]
    if not devices:
        return []
    keys = ("read_bytes_per_second", "matrix_flops_per_second")
    rates = {key: median(device[key] for device in devices) for key in keys}
    name = devices[0].get("device", "The device")
    return [
        f"{name}: {rates_text(rates)}, measured in each round; the limit follows from what it"
        " reaches around each cell."
    ]


def _errors(engines: Iterable[Engine]) -> list[str]:
    found = [
        f"FAILED: {engine.name} in round {number}: {reading.error}"
        for engine in engines
        for number, reading in enumerate(engine.readings, 1)
        if reading.error
    ]
    return [*found, ""] if found else []


def as_json(engines: Sequence[Engine], grid: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every figure of every round, and the ratios of the first engine to the others."""
    ours = engines[0]
    return [
        {
            "name": engine.name,
            "command": list(engine.command),
            "cells": [
                {
                    "cell": str(cell),
                    "tokens_per_second": engine.speed(cell),
                    "limit_fraction": engine.fraction(cell),
                    **_ratio_entries(ours, engine, cell),
                    "seconds": [reading.seconds.get(cell) for reading in engine.readings],
                }
                for cell in grid
            ],
            "ready_seconds": [reading.ready for reading in engine.readings],
            "devices": [reading.device for reading in engine.readings],
            "errors": [reading.error for reading in engine.readings],
        }
        for engine in engines
    ]


def _ratio_entries(ours: Engine, engine: Engine, cell: Cell) -> dict[str, Any]:
    found = [] if engine is ours else _cell_ratios(ours, engine, cell)
    return {"ratio": _middle(found), "ratios": found}


def draw(folder: Path, title: str, engines: Sequence[Engine], grid: Sequence[Cell]) -> None:
    """``result.svg``; none if there is no ratio to draw."""
    ours, *peers = engines
    series = {}
    for peer in peers:
        found = {str(cell): _cell_ratios(ours, peer, cell) for cell in grid}
        if known := {cell: each for cell, each in found.items() if each}:
            series[peer.name] = known
    picture = folder / "result.svg"
    picture.unlink(missing_ok=True)
    if series:
        picture.write_text(ratio_plot(title, series))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="benchmarks.cpu", description=__doc__.split("\n")[0])
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--shape", choices=(*SHAPES, TINY), default="qwen0.5b")
    model.add_argument("--model", type=Path, metavar="FOLDER", help="a checkpoint, not made up")
    parser.add_argument("--quantization", metavar="NAME", help="of this engine's weights")
    parser.add_argument("--device", default="cpu", help="any platform")
    parser.add_argument("--ours", metavar="COMMAND", help="in place of benchmarks.grid")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND",
                        help="another engine; may be given several times")  # fmt: skip
    parser.add_argument("--rounds", type=_count, default=3, metavar="N")
    parser.add_argument("--repeats", type=_count, default=3, metavar="N", help="of this engine's")
    parser.add_argument("--cells", type=cells, default=GRID, metavar="LIST",
                        help="of the grid or others, such as 1x32+64,4x512+1")  # fmt: skip
    parser.add_argument("--limit", type=float, default=1800.0, metavar="SECONDS",
                        help="of one process")  # fmt: skip
    parser.add_argument("--output", type=Path, default=Path("bench-cpu"), metavar="FOLDER")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of at least 1")
    return int(text)


def _ours(args: argparse.Namespace, folder: Path) -> Engine:
    if args.ours is not None:
        return Engine(name=OURS, command=shlex.split(args.ours))
    words = ["--device", args.device, "--repeats", str(args.repeats)]
    words += ["--cells", ",".join(map(str, args.cells))]
    if args.quantization:
        words += ["--quantization", args.quantization]
    if args.model is not None:
        model = args.model
    else:
        shape = tiny(SHAPES["llama1b"]) if args.shape == TINY else SHAPES[args.shape]
        model = write_config(folder, shape)
        words.append("--dummy")
    return Engine(name=OURS, command=[sys.executable, "-m", "benchmarks.grid", str(model), *words])


def _peers(parser: argparse.ArgumentParser, given: Sequence[str]) -> list[Engine]:
    found: dict[str, Engine] = {}
    for text in given:
        name, _, command = text.partition("=")
        words = shlex.split(command)
        if not name or not words or name in (OURS, *found):
            parser.error(f"--peer takes NAME=COMMAND, each name once, not {text!r}")
        found[name] = Engine(name=name, command=words)
    return list(found.values())


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    args = parser.parse_args(arguments)
    peers = _peers(parser, args.peer)
    machine = describe_machine()
    print("\n".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
    with tempfile.TemporaryDirectory(prefix="dovetail-bench-") as folder:
        engines = [_ours(args, Path(folder) / args.shape), *peers]
        what = f"`{args.model.name}`" if args.model else f"`{args.shape}`, random weights, bf16"
        if args.quantization:
            what += f"; {OURS} with {args.quantization}"
        for done in run_rounds(engines, args.rounds, args.limit):
            text = report(machine, what, engines, args.cells, done).replace(folder, "FOLDER")
            result = {"model": what, "rounds": done, "engines": as_json(engines, args.cells)}
            write_report(args.output, text, machine, result)
            title = f"How many times as fast {OURS} is: {what.replace('`', '')}"
            draw(args.output, title, engines, args.cells)
    show_report(args.output, text)
    return 1 if _errors(engines) else 0


if __name__ == "__main__":
    raise SystemExit(main())
