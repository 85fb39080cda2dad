"""The price of deterministic mode: tokens per second with and without it.

    OMP_NUM_THREADS=2 python benchmarks/deterministic.py --threads 2
    OMP_NUM_THREADS=1 python benchmarks/deterministic.py --threads 1 --processor-time

The model has the shape of Qwen2 0.5B and random weights. ``decode`` counts the tokens of the steps
in which every request gets one; ``prefill`` those of a prompt that one step computes. Rounds of
the two modes take turns, and the best of each counts. On a machine that others use, one thread's
processor time says more than the time on the wall.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dovetail.core.config.schema import EngineConfig
from dovetail.core.engine.build import build_engine, ignore_progress
from dovetail.core.engine.core import EngineCore
from dovetail.core.request import Request, SamplingParams

Clock = Callable[[], float]

SHAPE: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "vocab_size": 151936,
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "eos_token_id": 0,
}


def make_core(folder: Path, dtype: str, threads: int, **settings: Any) -> EngineCore:
    (folder / "config.json").write_text(json.dumps(SHAPE))
    config = EngineConfig.from_kwargs(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        dtype=dtype,
        threads=threads,
        max_model_len=2048,
        kv_cache_memory_bytes=1 << 30,
        enable_prefix_caching=False,
        **settings,
    )
    return build_engine(config, "cpu", ignore_progress).core


def fill(core: EngineCore, rows: int, length: int, num_new: int) -> None:
    rng = random.Random(0)
    for i in range(1, rows + 1):
        core.add(
            Request(
                id=i,
                prompt_token_ids=[rng.randrange(1, 1000) for _ in range(length)],
                params=SamplingParams(temperature=0.0, max_tokens=num_new),
                stop_token_ids=[],
                seed=i,
                arrival_time=float(i),
            )
        )


def decode_rate(core: EngineCore, rows: int, context: int, steps: int, clock: Clock) -> float:
    """Tokens per second of the steps after the prefill."""
    fill(core, rows, context, steps + 1)
    while any(not s.has_started for s in core.scheduler.sequences.values()):
        core.step()
    count, start = 0, clock()
    while core.has_work():
        count += sum(len(update.token_ids) for update in core.step())
    return count / (clock() - start)


def prefill_rate(core: EngineCore, length: int, clock: Clock) -> float:
    fill(core, 1, length, 1)
    start = clock()
    while core.has_work():
        core.step()
    return length / (clock() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="*", default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processor-time", action="store_true")
    args = parser.parse_args()
    clock = time.process_time if args.processor_time else time.perf_counter
    for dtype in args.dtype:
        with tempfile.TemporaryDirectory() as folder:
            modes = [
                make_core(Path(folder), dtype, args.threads, deterministic=on)
                for on in (False, True)
            ]
        print(f"\n{dtype:24} tokens/s  deterministic  ratio")
        jobs: list[tuple[str, Any]] = [
            (
                f"decode, batch {rows}",
                lambda c, r=rows: decode_rate(c, r, args.context, args.steps, clock),
            )
            for rows in args.batch
        ]
        jobs.append((f"prefill of {args.prompt}", lambda c: prefill_rate(c, args.prompt, clock)))
        for name, job in jobs:
            rates = [[job(core) for core in modes] for _ in range(args.rounds)]
            plain, steady = (max(column) for column in zip(*rates, strict=True))
            print(f"{name:24} {plain:8.1f} {steady:14.1f} {steady / plain:6.2f}", flush=True)


if __name__ == "__main__":
    main()
