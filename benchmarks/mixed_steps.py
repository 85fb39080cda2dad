"""What it brings to record steps that mix prompts and decoding, beside recording decode steps only.

    python -m benchmarks.mixed_steps --shape qwen3-0.6b

Each way is a process of its own; they take turns. Told are the time of a step in which one prompt
is all there is, and, where a prompt joins every few steps as with clients that come one by one, the
time of steps and the tokens per second. Weights are random.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.shapes import SHAPES, write_config
from dovetail.attention_backends.triton.backend import TritonAttention
from dovetail.core.bench.workloads import Sample
from dovetail.core.cli.offline import Offline, start_offline
from dovetail.core.config.schema import EngineConfig
from dovetail.core.engine.collector import calm
from dovetail.core.request import Request, SamplingParams

WAYS = ("decode steps", "mixed steps too")
_PROMPTS = (32, 128, 512, 1000)
_CLIENTS, _STEPS_BETWEEN, _PROMPT, _ANSWER = 80, 4, 200, 64


def start(shape: str, device: str, folder: Path) -> Offline:
    config = EngineConfig(
        model=str(write_config(folder, SHAPES[shape])),
        device=device,
        load_format="dummy",
        skip_tokenizer_init=True,
        attention_backend="triton",
        max_num_seqs=256,
        max_model_len=2048,
    )
    return start_offline(config, with_tokenizer=False)


def alone(offline: Offline, length: int, rng: np.random.Generator) -> float:
    """Milliseconds of the one step of a prompt of so many tokens: the median of a dozen."""
    taken = []
    for _ in range(12):
        tokens = rng.integers(0, offline.vocab_size, length).tolist()
        offline.meter.clear()
        offline.generate([Sample(token_ids=tokens, output_len=1)], 0.6, detokenize=False)
        taken.append(1e3 * offline.meter.times.steps[-1].total)
    return float(np.median(taken))


def trickle(offline: Offline, rng: np.random.Generator) -> dict[str, float]:
    """A prompt joins every few steps."""
    core = offline.llm.core
    waiting = [
        Request(
            id=1_000_000 + number,
            prompt_token_ids=rng.integers(0, offline.vocab_size, _PROMPT).tolist(),
            params=SamplingParams(temperature=0.6, max_tokens=_ANSWER),
            stop_token_ids=[],
            seed=number,
            arrival_time=float(number),
        )
        for number in range(_CLIENTS)
    ]
    offline.meter.clear()
    begin, count = time.perf_counter(), 0
    with calm():
        while waiting or core.has_work():
            if waiting and count % _STEPS_BETWEEN == 0:
                core.add(waiting.pop())
            core.step()
            count += 1
    seconds = time.perf_counter() - begin
    steps = 1e3 * np.array([step.total for step in offline.meter.times.steps])
    return {
        "tokens_per_second": _CLIENTS * _ANSWER / seconds,
        "step_ms_median": float(np.median(steps)),
        "step_ms_p99": float(np.percentile(steps, 99)),
    }


def measure(shape: str, device: str, way: str) -> dict[str, Any]:
    TritonAttention.records_mixed = way == WAYS[1]
    with tempfile.TemporaryDirectory() as folder:
        offline = start(shape, device, Path(folder))
        rng = np.random.default_rng(0)
        alone(offline, 64, rng)
        prompts = {length: alone(offline, length, rng) for length in _PROMPTS}
        return {"prompt_ms": prompts, **trickle(offline, rng)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--way", choices=WAYS, help="measure it here, once, and write JSON")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.shape, args.device, args.way)))
        return
    for number in range(args.rounds):
        for way in WAYS:
            words = ["--shape", args.shape, "--device", args.device, "--way", way]
            command = [sys.executable, "-m", "benchmarks.mixed_steps", *words]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            found = json.loads(done.stdout.splitlines()[-1])
            prompts = ", ".join(f"{n}: {ms:.2f}" for n, ms in found["prompt_ms"].items())
            print(
                f"round {number + 1}, {way} recorded: a prompt alone, ms: {prompts}; a prompt every"
                f" {_STEPS_BETWEEN} steps: {found['tokens_per_second']:.0f} tokens/s, a step"
                f" {found['step_ms_median']:.2f} ms, P99 {found['step_ms_p99']:.2f} ms",
                flush=True,
            )


if __name__ == "__main__":
    main()
