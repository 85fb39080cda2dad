"""What the rules of scheduling cost and give, counted in steps: the same on every machine.

    python benchmarks/scheduling.py

The engine runs over the null platform. A wait is the number of steps from a request's arrival to
its first token.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request, SamplingParams
from dovetail.core.scheduler import admission, plan, running
from dovetail.core.scheduler.scheduler import Scheduler, SchedulerConfig
from dovetail.platforms.null import NullPlatform

SIZE, VOCAB = 16, 1000
Load = Sequence[tuple[int, int, int]]
"""(step of arrival, tokens of the prompt, tokens of the answer), by arrival."""


def make_engine(**limits: int) -> EngineCore:
    """An engine without prefix cache, for prompts all of whose tokens are the same."""
    config = SchedulerConfig(
        block_size=SIZE, vocab_size=VOCAB, enable_prefix_caching=False,
        **{"max_model_len": 8192, "max_num_batched_tokens": 256, "max_num_seqs": 64} | limits,
    )  # fmt: skip
    runner = NullPlatform().runner(
        RunnerConfig(
            model_path=Path(), hf_config={"vocab_size": VOCAB}, model_impl="native",
            load_format="dummy", dtype="float32", kv_dtype="float32", block_size=SIZE,
            max_model_len=config.max_model_len, max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
    )  # fmt: skip
    return EngineCore(Scheduler(config), runner)


def run(engine: EngineCore, load: Load) -> np.ndarray:
    """The wait of each request, in the order of the load."""
    first: dict[int, int] = {}
    step, number = 0, 0
    while number < len(load) or engine.has_work():
        while number < len(load) and load[number][0] <= step:
            _, prompt, answer = load[number]
            number += 1
            engine.add(
                Request(
                    id=number, prompt_token_ids=[9] * prompt, stop_token_ids=[], seed=0,
                    params=SamplingParams(temperature=0.0, max_tokens=answer),
                    arrival_time=float(number),
                )
            )  # fmt: skip
        for update in engine.step():
            first.setdefault(update.id, step)
        step += 1
    return np.array([first[i + 1] - load[i][0] + 1 for i in range(len(load))])


def budget() -> None:
    """Long prompts and the budget of a step."""
    rng = random.Random(0)
    mixed = [min(5900, int(rng.lognormvariate(6, 1.2)) + 1) for _ in range(100)]
    pace = sum(mixed) / 256 / len(mixed) / 0.9
    loads: dict[str, Load] = {
        "8 prompts of 2000 at once": [(0, 2000, 8)] * 8,
        "one of 5900, then 16 of 50": [(0, 5900, 8)] + [(2 * i, 50, 8) for i in range(16)],
        "100 mixed, 90 % load": [(int(i * pace), n, 8) for i, n in enumerate(mixed)],
    }
    print("\n| load | rule | steps | mean wait | longest | first one |")
    print("|---|---|---|---|---|---|")
    half = plan.chunk
    rules = {"the first takes all": lambda wanted, left, **_: min(wanted, left), "half": half}
    for name, load in loads.items():
        for rule, function in rules.items():
            running.chunk = admission.chunk = function
            engine = make_engine(num_blocks=4000)
            waits = run(engine, load)
            steps = engine.scheduler.stats.num_steps
            print(
                f"| {name} | {rule} | {steps} | {waits.mean():.1f} | {waits.max()} | {waits[0]} |"
            )
    running.chunk = admission.chunk = half


def bypass() -> None:
    """Requests that may start before one for which there are no blocks."""
    print("\n| long prompts | bypasses | steps | mean wait | of long ones | preemptions |")
    print("|---|---|---|---|---|---|")
    for share in (0.05, 0.2, 0.5):
        for bound in (0, 2, 8, 32):
            rng, load = random.Random(1), []
            for _ in range(400):
                long = rng.random() < share
                prompt = rng.randrange(800, 1400) if long else rng.randrange(16, 160)
                load.append((0, prompt, rng.randrange(20, 160)))
            engine = make_engine(num_blocks=129, max_num_seqs=32, max_bypasses=bound)
            waits = run(engine, load)
            of_long = waits[[prompt >= 800 for _, prompt, _ in load]].mean()
            stats = engine.scheduler.stats
            print(
                f"| {share:.0%} | {bound} | {stats.num_steps} | {waits.mean():.0f} |"
                f" {of_long:.0f} | {stats.num_preemptions} |"
            )


def pressure() -> None:
    """64 requests of full length in a pool for 4: rows without number against four rows."""
    print("\n| prompt | rows | steps | preemptions | tokens per step |")
    print("|---|---|---|---|---|")
    for prompt in (32, 128, 400):
        for rows in (4, 64):
            engine = make_engine(num_blocks=4 * 32 + 1, max_model_len=512, max_num_seqs=rows)
            run(engine, [(0, prompt, 512 - prompt)] * 64)
            stats = engine.scheduler.stats
            useful = 64 * (512 - prompt) / stats.num_steps
            print(
                f"| {prompt} | {rows} | {stats.num_steps} | {stats.num_preemptions} |"
                f" {useful:.1f} |"
            )


if __name__ == "__main__":
    budget()
    bypass()
    pressure()
