"""``python -m dovetail.core.simulate``: many seeds, or one of them exactly again."""

from __future__ import annotations

import argparse
import logging
import sys
import time

from dovetail.core.simulate.shrink import keep, shrink
from dovetail.core.simulate.workload import Scenario, draw
from dovetail.core.simulate.world import run

__all__ = ["main"]

_PROGRESS_S = 5.0


def main(arguments: list[str] | None = None) -> int:
    """Run seeds one after another; 1 if one of them goes wrong."""
    options = _parser().parse_args(arguments)
    begin = last = time.monotonic()
    num_steps = 0
    for seed in range(options.start, options.start + options.seeds):
        scenario = draw(seed)
        if options.events is not None:
            scenario = keep(scenario, [int(item) for item in options.events.split(",") if item])
        outcome = run(scenario)
        num_steps += outcome.num_steps
        if options.steps:
            _say("\n".join([f"seed={seed} {scenario.knobs}", *outcome.trace]))
        if outcome.failure is not None:
            _report(scenario, outcome.failure.message, is_whole=options.events is None)
            return 1
        if time.monotonic() - last > _PROGRESS_S:
            last = time.monotonic()
            _say(f"{seed + 1 - options.start} of {options.seeds} seeds, {num_steps} steps")
    seconds = time.monotonic() - begin
    _say(f"{options.seeds} seeds, {num_steps} steps, {seconds:.1f} s: nothing went wrong")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m dovetail.core.simulate", description=__doc__)
    parser.add_argument("--seeds", type=int, default=500, help="How many. Default: 500.")
    parser.add_argument("--start", type=int, default=0, help="The first one. Default: 0.")
    parser.add_argument("--steps", action="store_true", help="Print all that happens.")
    parser.add_argument("--events", metavar="N,N", help="Only these events of the seed's.")
    return parser


def _report(scenario: Scenario, message: str, *, is_whole: bool) -> None:
    command = f"python -m dovetail.core.simulate --seeds 1 --start {scenario.seed} --steps"
    _say(f"seed={scenario.seed} failed: {message}\nagain: {command}")
    if is_whole:
        fewest = shrink(scenario)
        _say(f"the fewest events that fail: {command} --events {','.join(map(str, fewest))}")
        _say("\n".join(f"  {scenario.events[index]}" for index in fewest))


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.exit(main())
