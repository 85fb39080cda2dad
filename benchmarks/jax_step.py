"""A decode step of the JAX platform on the CPU beside one of the torch CPU platform.

    DOVETAIL_TPU_SIMULATE=1 python benchmarks/jax_step.py [--steps 200] [--rounds 5]

Both platforms step a tiny random Llama and the bundled model, in turn, in one process. Prints the
median milliseconds of a decode step in which every request gets a token, and their ratio.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from dovetail.core.config.schema import EngineConfig
from dovetail.core.demo import demo_model_path
from dovetail.core.engine.build import build_engine, ignore_progress
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request, SamplingParams

PLATFORMS = ("cpu", "tpu")
PROMPT = 32


def make_core(model: Path, platform: str, dtype: str, num_requests: int, length: int) -> EngineCore:
    settings: dict[str, Any] = {"max_num_seqs": num_requests, "max_model_len": length}
    config = EngineConfig.from_kwargs(model=str(model), dtype=dtype, **settings)
    return build_engine(config, platform, ignore_progress).core


def steps(core: EngineCore, num_requests: int, num_steps: int, first: int) -> np.ndarray:
    """Milliseconds of each decode step."""
    params = SamplingParams(temperature=0.0, max_tokens=num_steps + 8, ignore_eos=True)
    for i in range(num_requests):
        prompt = np.random.default_rng(i).integers(3, 250, PROMPT).tolist()
        core.add(
            Request(
                id=first + i,
                prompt_token_ids=prompt,
                params=params,
                stop_token_ids=[],
                seed=i,
                arrival_time=0.0,
            )
        )
    while len(core.step()) < num_requests:
        continue
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        core.step()
        times.append(time.perf_counter() - start)
    while core.has_work():
        core.step()
    return np.array(times) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    from tests.checkpoints import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        models = {"tiny llama": make_checkpoint("llama", folder), "bundled": demo_model_path()}
        print("| model | dtype | requests | torch cpu, ms | jax on the CPU, ms | ratio |")
        print("|---|---|---|---|---|---|")
        for name, model in models.items():
            for dtype in ("float32", "bfloat16"):
                for num_requests in (1, 8):
                    show(name, model, dtype, num_requests, args)


def show(name: str, model: Path, dtype: str, num_requests: int, args: argparse.Namespace) -> None:
    length = PROMPT + args.steps + 16
    cores = {p: make_core(model, p, dtype, num_requests, length) for p in PLATFORMS}
    times: dict[str, list[float]] = {p: [] for p in PLATFORMS}
    for turn in range(args.rounds):
        for platform, core in cores.items():
            each = steps(core, num_requests, args.steps, 1 + turn * num_requests)
            times[platform].append(float(np.median(each)))
    torch_ms, jax_ms = (float(np.median(times[p])) for p in PLATFORMS)
    row = (
        name,
        dtype,
        num_requests,
        f"{torch_ms:.2f}",
        f"{jax_ms:.2f}",
        f"{jax_ms / torch_ms:.2f}",
    )
    print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
