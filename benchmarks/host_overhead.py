"""What the host costs per step: the whole engine over the null platform, which computes nothing.

    python benchmarks/host_overhead.py [--requests 256] [--steps 400]

Prints the median and the 90th percentile, in microseconds, of a decode step in which every
request gets a token: scheduling, building the batch, taking in the result, and encoding the
message for the front end. Prompts have 100 to 1000 tokens, so blocks fill up all the time.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.engine.collector import settle
from dovetail.core.engine.core import EngineCore
from dovetail.core.engine.messages import Outputs, encode
from dovetail.core.request import Request, SamplingParams
from dovetail.core.scheduler.scheduler import Scheduler, SchedulerConfig
from dovetail.platforms.null import NullPlatform

BLOCK_SIZE = 16
MAX_LEN = 2048


def make_engine(num_requests: int, steps_ahead: int) -> EngineCore:
    """An engine with room for every request."""
    vocab = 151_936
    runner = NullPlatform().runner(
        RunnerConfig(
            model_path=Path(),
            hf_config={"vocab_size": vocab},
            model_impl="native",
            load_format="dummy",
            dtype="bfloat16",
            kv_dtype="bfloat16",
            block_size=BLOCK_SIZE,
            max_model_len=MAX_LEN,
            max_num_seqs=num_requests,
            max_num_batched_tokens=8192,
        )
    )
    config = SchedulerConfig(
        num_blocks=num_requests * MAX_LEN // BLOCK_SIZE + 1,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_LEN,
        max_num_seqs=num_requests,
        max_num_batched_tokens=8192,
        vocab_size=vocab,
    )
    return EngineCore(Scheduler(config), runner, steps_ahead=steps_ahead)


def measure(num_requests: int, num_steps: int, steps_ahead: int, temperature: float) -> np.ndarray:
    """Microseconds of each decode step, (steps, 2): the step, and encoding its message."""
    engine = make_engine(num_requests, steps_ahead)
    rng = np.random.default_rng(0)
    params = SamplingParams(temperature=temperature, top_p=0.9, max_tokens=1000)
    for number in range(1, num_requests + 1):
        prompt = rng.integers(3, 16_000, int(rng.integers(100, 1000))).tolist()
        engine.add(
            Request(
                id=number,
                prompt_token_ids=prompt,
                params=params,
                stop_token_ids=[2],
                seed=number,
                arrival_time=0.0,
            )
        )
    while len(engine.step()) < num_requests:
        continue
    settle()
    times = np.zeros((num_steps, 2))
    for i in range(num_steps):
        start = time.perf_counter()
        updates = engine.step()
        middle = time.perf_counter()
        encode(Outputs(updates=updates, stats=engine.stats()))
        times[i] = middle - start, time.perf_counter() - middle
        if len(updates) != num_requests:
            raise SystemExit(f"a step gave {len(updates)} tokens instead of {num_requests}")
    return times * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--requests", type=int, nargs="*", default=[1, 64, 256, 1024])
    parser.add_argument("--steps", type=int, default=400)
    args = parser.parse_args()
    print("| requests | sampling | steps ahead | step, median µs | p90 | message, median µs |")
    print("|---|---|---|---|---|---|")
    for num_requests in args.requests:
        for name, temperature in (("greedy", 0.0), ("top-p", 0.8)):
            for steps_ahead in (0, 1):
                times = measure(num_requests, args.steps, steps_ahead, temperature)
                step, message = np.median(times, axis=0)
                p90 = np.percentile(times[:, 0], 90)
                row = (
                    num_requests,
                    name,
                    steps_ahead,
                    f"{step:.0f}",
                    f"{p90:.0f}",
                    f"{message:.0f}",
                )
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
