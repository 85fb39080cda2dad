"""This engine over a grid of requests: the process that ``benchmarks.cpu`` starts in each round.

    python -m benchmarks.grid MODEL [--dummy] [--device cpu] [--quantization int8]

Prints ``ready s X`` once the model is loaded, a line of JSON with what the device was measured to
do, and a line of JSON for each cell: ``{"requests": 1, "prompt": 32, "new": 64, "s": 2.47}``, the
best of a few repeats, with the seconds that the device would need at least (``limit_s``), by what
it was measured to do before and after. Any program that prints such lines can stand beside it.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import mean
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dovetail import LLM
    from dovetail.core.bench.roofline import StepCost
    from dovetail.core.contracts.platform import Rates

__all__ = ["GRID", "Cell", "Limits", "cells"]

_MOST_TOKEN = 16_000
_LEAST_TOKEN = 3
"""Token numbers of prompts: without special ones, and such as every vocabulary has."""


@dataclass(frozen=True)
class Cell:
    """Requests that start together, each with so many tokens in and out."""

    requests: int
    prompt: int
    new: int

    def __str__(self) -> str:
        return f"{self.requests}x{self.prompt}+{self.new}"

    @property
    def tokens(self) -> int:
        """What is counted: new tokens, or the prompts' where one token is asked for."""
        return self.requests * (self.new if self.new > 1 else self.prompt)


GRID = (
    Cell(1, 32, 64), Cell(8, 32, 64), Cell(32, 32, 64),
    Cell(1, 1024, 1), Cell(4, 512, 1), Cell(16, 256, 64),
)  # fmt: skip
_WARM_UP = Cell(1, 16, 4)


def cells(text: str) -> tuple[Cell, ...]:
    """From ``1x32+64,4x512+1``. Raises ValueError."""
    found = []
    for part in text.split(","):
        numbers = part.replace("+", "x").split("x")
        if len(numbers) != 3 or not all(n.isdecimal() and int(n) for n in numbers):
            raise ValueError(f"{part!r} is no cell; one looks like 1x32+64")
        found.append(Cell(*map(int, numbers)))
    return tuple(found)


def measure(
    generate: Callable[[list[list[int]], int], object],
    grid: Sequence[Cell],
    *,
    repeats: int,
    most_token: int,
    limit: Callable[[Cell], dict[str, float]],
) -> None:
    """Print a line for each cell, the best of the repeats, each with prompts of its own."""
    rng = random.Random(0)

    def prompts(cell: Cell) -> list[list[int]]:
        return [
            [rng.randrange(_LEAST_TOKEN, most_token) for _ in range(cell.prompt)]
            for _ in range(cell.requests)
        ]

    generate(prompts(_WARM_UP), _WARM_UP.new)
    for cell in grid:
        best = float("inf")
        for _ in range(repeats):
            batch = prompts(cell)
            start = time.perf_counter()
            generate(batch, cell.new)
            best = min(best, time.perf_counter() - start)
        print(json.dumps({**asdict(cell), "s": best, **limit(cell)}), flush=True)


class Limits:
    """What the device needs at least for cells, by what it does just before and just after each.

    Machines that are shared change within minutes.

    Args:
        cost: Of the model's steps.
        rates: Measures the device.
    """

    def __init__(self, cost: StepCost, rates: Callable[[], Rates]) -> None:
        self._cost = cost
        self._measure = rates
        self.rates = rates()
        """As measured last."""

    def of(self, cell: Cell) -> float:
        """Seconds, for a cell that has been measured since this was last asked."""
        from dovetail.core.bench.roofline import Roofline

        around = (self.rates, self._measure())
        self.rates = around[-1]
        requests = [(cell.prompt, cell.new)] * cell.requests
        return mean(Roofline(cost=self._cost, rates=each).workload(requests) for each in around)


def _limits(llm: LLM) -> Limits | None:
    """Of this model here; None, said on standard error, if there is none."""
    from dovetail.core.bench.roofline import step_cost
    from dovetail.core.errors import UnsupportedError

    config = llm.config.runner_config()
    try:
        cost = step_cost(config, llm.core.runner.plan())
        return Limits(cost, lambda: llm.platform.rates(config.dtype))
    except UnsupportedError as error:
        print(f"no limit: {error}", file=sys.stderr)
        return None


def _engine(args: argparse.Namespace) -> LLM:
    from dovetail import LLM

    settings: dict[str, Any] = {"load_format": "dummy"} if args.dummy else {}
    if args.quantization:
        settings["quantization"] = args.quantization
    return LLM(
        model=args.model,
        device=args.device,
        dtype=args.dtype,
        max_model_len=max(cell.prompt + cell.new for cell in (_WARM_UP, *args.cells)),
        max_num_seqs=64,
        max_num_batched_tokens=2048,
        enable_prefix_caching=False,
        skip_tokenizer_init=args.dummy,
        **settings,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks.grid", description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a folder with a model")
    parser.add_argument("--dummy", action="store_true", help="weights are made up; no tokenizer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", metavar="NAME")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    parser.add_argument("--cells", type=cells, default=GRID, metavar="LIST")
    args = parser.parse_args(arguments)
    start = time.perf_counter()
    llm = _engine(args)
    print(f"ready s {time.perf_counter() - start:.2f}", flush=True)
    from dovetail import SamplingParams

    limits = _limits(llm)
    if limits is not None:
        device = {"device": llm.platform.device_names()[0]}
        print(json.dumps({**device, **asdict(limits.rates)}), flush=True)

    def limit(cell: Cell) -> dict[str, float]:
        return {} if limits is None else {"limit_s": limits.of(cell)}

    def generate(prompts: list[list[int]], new: int) -> None:
        params = SamplingParams(
            max_tokens=new, temperature=0, ignore_eos=True, detokenize=not args.dummy
        )
        llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)

    vocab_size = llm.config.runner_config().hf_config["vocab_size"]
    most = min(_MOST_TOKEN, vocab_size)
    measure(generate, args.cells, repeats=args.repeats, most_token=most, limit=limit)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
