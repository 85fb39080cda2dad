"""What a form costs: decode steps with a grammar on every row and with none, in turn.

    python benchmarks/structured_output.py MODEL [--batch 16] [--steps 60] [--rounds 4]
                                           [--load-format dummy] [--clock cpu]

Prints the median step in milliseconds of each kind over all rounds, the share of it that is spent
on working out masks and on following the tokens, and the overhead. A step is scheduling, masks,
the model, sampling and taking in the tokens, in one process. Each round measures both kinds, so
that a machine that changes its speed changes it for both. The answers are an endless JSON array of
objects, so that every step of a round has all its rows. On a shared machine ``--clock cpu`` counts
the processor time of all threads instead (set OMP_NUM_THREADS=1: waiting threads spin).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from dovetail.core.config.schema import EngineConfig
from dovetail.core.constraint import StructuredOutputsParams
from dovetail.core.engine.build import build_engine, ignore_progress
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request, SamplingParams
from dovetail.core.structured.source import grammar_source


def endless(*, bounded: bool) -> dict[str, Any]:
    """An array of objects without end. Bounded strings and patterns cost the most per mask."""

    def text(most: int) -> dict[str, Any]:
        return {"type": "string", "maxLength": most} if bounded else {"type": "string"}

    pattern = "^[a-z]{1,12}@[a-z]{1,12}\\.(com|org)$"
    address = {"street": text(30), "no": {"type": "integer"}}
    person = {
        "name": text(40),
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": pattern} if bounded else text(0),
        "kind": {"enum": ["person", "company", "robot"]},
        "tags": {"type": "array", "items": text(12), "maxItems": 4},
        "address": closed(address),
    }
    return {"type": "array", "items": closed(person), "minItems": 10_000}


def closed(properties: dict[str, Any]) -> dict[str, Any]:
    """An object with these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


Clock = Callable[[], float]


class Meter:
    """Passes calls on to the engine's grammars and adds up how long they take."""

    def __init__(self, grammars: Any, clock: Clock) -> None:
        self._grammars = grammars
        self.clock = clock
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._grammars, name)
        if name not in ("masks", "accept"):
            return method

        def timed(*arguments: Any) -> Any:
            start = self.clock()
            result = method(*arguments)
            self.seconds += self.clock() - start
            return result

        return timed


class Bench:
    """One engine, and rounds of steps on it."""

    def __init__(self, core: EngineCore, meter: Meter, batch: int) -> None:
        self.core, self.batch, self.meter = core, batch, meter
        self.next_id = 1

    def print_row(
        self, name: str, temperature: float, kind: str, grammar: str, args: argparse.Namespace
    ) -> None:
        """Rounds without and with the grammar, in turn."""
        free: list[float] = []
        formed: list[float] = []
        inside: list[float] = []
        for _ in range(args.rounds):
            free += self.round("", args.steps, temperature)[0]
            times, seconds = self.round(grammar, args.steps, temperature)
            formed += times
            inside.append(seconds)
        one, two, share = (np.median(x) * 1e3 for x in (free, formed, inside))
        over = 100 * (two / one - 1)
        print(
            f"| {name} | {kind} | {one:.2f} | {two:.2f} | {share:.2f} | {over:.1f} % |", flush=True
        )

    def round(self, grammar: str, steps: int, temperature: float) -> tuple[list[float], float]:
        """Seconds of each decode step, and seconds in grammars per step."""
        params = SamplingParams(temperature=temperature, top_p=0.95, max_tokens=4000)
        ids = list(range(self.next_id, self.next_id + self.batch))
        self.next_id += self.batch
        for number in ids:
            prompt = np.random.default_rng(number % self.batch).integers(300, 9000, 16).tolist()
            self.core.add(
                Request(
                    id=number,
                    prompt_token_ids=prompt,
                    params=params,
                    stop_token_ids=[],
                    seed=number,
                    arrival_time=0.0,
                    grammar=grammar,
                )
            )
        warm = 0
        while warm < 3:
            warm += len(self.core.step()) == self.batch
        self.meter.seconds, times = 0.0, []
        for _ in range(steps):
            start = self.meter.clock()
            updates = self.core.step()
            times.append(self.meter.clock() - start)
            if len(updates) != self.batch or any(u.error for u in updates):
                raise SystemExit(f"{len(updates)} updates; errors: {[u.error for u in updates]}")
        inside = self.meter.seconds / steps
        self.core.abort(ids)
        return times, inside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    args = parser.parse_args()
    config = EngineConfig.from_kwargs(
        model=args.model,
        load_format=args.load_format,
        max_model_len=4096,
        max_num_seqs=args.batch,
    )
    built = build_engine(config, args.device, ignore_progress)
    clock = time.process_time if args.clock == "cpu" else time.perf_counter
    meter = Meter(built.core.scheduler.grammars, clock)
    built.core.scheduler.grammars = meter  # type: ignore[assignment]
    bench = Bench(built.core, meter, args.batch)
    print("| sampling | schema | free, ms | with a form, ms | of that grammars, ms | overhead |")
    print("|---|---|---|---|---|---|")
    for name, temperature in (("greedy", 0.0), ("top-p", 0.8)):
        for kind, bounded in (("usual", False), ("bounded strings", True)):
            form = StructuredOutputsParams(json=endless(bounded=bounded))
            bench.print_row(name, temperature, kind, grammar_source(form), args)


if __name__ == "__main__":
    main()
