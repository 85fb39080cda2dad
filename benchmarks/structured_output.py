"""What a form costs: decode steps with a grammar on every row and with none, in turn.

    python benchmarks/structured_output.py MODEL [--batch 16] [--steps 60] [--rounds 4]
                                           [--load-format dummy]

Prints the median step in milliseconds of each kind over all rounds, the share of it that is spent
on working out masks and on following the tokens, and the overhead. A step is scheduling, masks,
the model, sampling and taking in the tokens, in one process. Each round measures both kinds, so
that a machine that changes its speed changes it for both. The answers are an endless JSON array of
objects, so that every step of a round has all its rows.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import numpy as np

from dovetail.core.config.schema import EngineConfig
from dovetail.core.constraint import StructuredOutputsParams
from dovetail.core.engine.build import build_engine, ignore_progress
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request, SamplingParams
from dovetail.core.structured.source import grammar_source

ITEM = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "email": {"type": "string", "pattern": "^[a-z]{1,12}@[a-z]{1,12}\\.(com|org)$"},
        "kind": {"enum": ["person", "company", "robot"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 4},
        "address": {
            "type": "object",
            "properties": {
                "street": {"type": "string", "maxLength": 30},
                "no": {"type": "integer"},
            },
            "required": ["street", "no"],
            "additionalProperties": False,
        },
    },
    "required": ["name", "age", "email", "kind", "tags", "address"],
    "additionalProperties": False,
}
SCHEMA = {"type": "array", "items": ITEM, "minItems": 10_000}


class Meter:
    """Passes calls on to the engine's grammars and adds up how long they take."""

    def __init__(self, grammars: Any) -> None:
        self._grammars = grammars
        self.seconds = 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._grammars, name)
        if name not in ("masks", "accept"):
            return method

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = method(*arguments)
            self.seconds += time.perf_counter() - start
            return result

        return timed


class Bench:
    """One engine, and rounds of steps on it."""

    def __init__(self, core: EngineCore, batch: int, temperature: float) -> None:
        self.core, self.batch = core, batch
        self.meter = Meter(core.scheduler.grammars)
        core.scheduler.grammars = self.meter  # type: ignore[assignment]
        self.params = SamplingParams(temperature=temperature, top_p=0.95, max_tokens=4000)
        self.next_id = 1

    def round(self, grammar: str, steps: int) -> tuple[list[float], float]:
        """Seconds of each decode step, and seconds in grammars per step."""
        ids = list(range(self.next_id, self.next_id + self.batch))
        self.next_id += self.batch
        for number in ids:
            prompt = np.random.default_rng(number % self.batch).integers(300, 9000, 16).tolist()
            self.core.add(
                Request(
                    id=number,
                    prompt_token_ids=prompt,
                    params=self.params,
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
            start = time.perf_counter()
            updates = self.core.step()
            times.append(time.perf_counter() - start)
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
    args = parser.parse_args()
    config = EngineConfig.from_kwargs(
        model=args.model,
        load_format=args.load_format,
        max_model_len=4096,
        max_num_seqs=args.batch,
    )
    built = build_engine(config, args.device, ignore_progress)
    grammar = grammar_source(StructuredOutputsParams(json=SCHEMA))
    print("| sampling | free, ms | with a form, ms | of that grammars, ms | overhead |")
    print("|---|---|---|---|---|")
    for name, temperature in (("greedy", 0.0), ("top-p", 0.8)):
        bench = Bench(built.core, args.batch, temperature)
        free: list[float] = []
        formed: list[float] = []
        inside: list[float] = []
        for _ in range(args.rounds):
            free += bench.round("", args.steps)[0]
            times, seconds = bench.round(grammar, args.steps)
            formed += times
            inside.append(seconds)
        one, two = np.median(free) * 1e3, np.median(formed) * 1e3
        share = np.median(inside) * 1e3
        print(f"| {name} | {one:.2f} | {two:.2f} | {share:.2f} | {100 * (two / one - 1):.1f} % |")


if __name__ == "__main__":
    main()
