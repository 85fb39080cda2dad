"""Time of the torch sampler per step, next to a plain argmax over the same logits.

    OMP_NUM_THREADS=2 python benchmarks/sampler.py --threads 2 --device cpu

With ``--device``, of the platform of that name, if it is one that chooses on the host: with its own
way of choosing, and without.

The logits are those of a made-up language model: a Zipf-like head whose sharpness varies from row
to row, in random order, over a normal tail. ``top_p flat`` draws from nearly equal logits, the
worst case: what is kept has a hundred thousand tokens. Times are the best of several.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable

import numpy as np
import torch

from dovetail.core.batch import Batch, JoinedRow, SamplingBatch
from dovetail.core.plugins.selection import load_platform
from dovetail.core.request import SamplingParams
from dovetail.core.sampling.noise import uniform
from dovetail.platforms.torch.platform import TorchPlatform
from dovetail.platforms.torch.sampler import Sampler
from dovetail.platforms.torch.sampling.choice import Choose, choose

CASES: dict[str, tuple[SamplingParams, int | None]] = {
    "greedy": (SamplingParams(temperature=0.0), None),
    "temperature": (SamplingParams(temperature=0.8), None),
    "top_p 0.95": (SamplingParams(top_p=0.95), None),
    "top_k 50, top_p 0.9": (SamplingParams(top_k=50, top_p=0.9), None),
    "min_p 0.05": (SamplingParams(min_p=0.05), None),
    "greedy, penalties": (SamplingParams(temperature=0.0, frequency_penalty=0.5), None),
    "top_k 50, penalties": (SamplingParams(top_k=50, repetition_penalty=1.1), None),
    "greedy, logprobs 5": (SamplingParams(temperature=0.0), 5),
    "top_p flat": (SamplingParams(top_p=0.95), None),
}


HOST = torch.device("cpu")


def model_logits(rows: int, vocab: int, flat: bool) -> torch.Tensor:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(rows, vocab)).astype(np.float32) * (0.1 if flat else 1.0)
    if not flat:
        rank = np.arange(1, 1001, dtype=np.float32)
        for row, sharpness in zip(logits, rng.uniform(1.0, 4.0, rows), strict=True):
            row[rng.permutation(vocab)[:1000]] = 18 - sharpness * np.log(rank)
    return torch.from_numpy(logits)


def step_of(params: SamplingParams, num_logprobs: int | None, rows: int, vocab: int) -> Batch:
    every, none = np.arange(rows, dtype=np.int32), np.zeros(0, np.int32)
    sampling = SamplingBatch(
        temperature=np.full(rows, params.temperature, np.float32),
        top_k=np.full(rows, params.top_k or vocab, np.int32),
        top_p=np.full(rows, params.top_p, np.float32),
        min_p=np.full(rows, params.min_p, np.float32),
        uniform=uniform(np.arange(rows, dtype=np.uint64), every),
        num_generated=every,
        all_greedy=params.is_greedy,
        restricts=bool(params.top_k or params.top_p < 1 or params.min_p),
        shapes_logits=params.shapes_logits,
        num_logprobs=num_logprobs,
    )
    return Batch(
        step=0,
        rows=every,
        query_lens=every,
        context_lens=every,
        block_tables=np.zeros((rows, 1), np.int32),
        token_ids=every,
        carried=none,
        carried_rows=none,
        sampled=every,
        sampling=sampling,
        copies=np.zeros((0, 2), np.int32),
    )


def best_of(run: Callable[[], object], repeats: int) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times) * 1e3


def measure(
    dtype: torch.dtype, rows: int, args: argparse.Namespace, choose: Choose
) -> dict[str, float]:
    logits = {flat: model_logits(rows, args.vocab, flat).to(dtype) for flat in (False, True)}
    found = {"plain argmax": best_of(lambda: logits[False].argmax(-1), args.repeats)}
    for name, (params, num_logprobs) in CASES.items():
        sampler, x = Sampler(args.vocab, rows, HOST, choose), logits["flat" in name]
        seen = np.random.default_rng(1).integers(0, args.vocab, 1000).astype(np.int32)
        joined = [
            JoinedRow(
                row=r, token_ids=seen, num_prompt_tokens=800, params=params, stop_token_ids=()
            )
            for r in range(rows)
        ]
        sampler.join(joined)
        batch = step_of(params, num_logprobs, rows, args.vocab)
        sampler.sample(x, batch)
        found[name] = best_of(lambda s=sampler, x=x, b=batch: s.sample(x, b), args.repeats)
    return found


def choices(name: str | None) -> dict[str, Choose]:
    """The ways to be measured, by what they are called."""
    found: dict[str, Choose] = {"torch": choose}
    if name is not None:
        platform = load_platform(name, os.environ)
        if not isinstance(platform, TorchPlatform) or platform.sampling_device != HOST:
            raise SystemExit(f"platform {name} does not choose on the host")
        found[name] = platform.choose_rows
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--device", metavar="PLATFORM")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for dtype in args.dtypes:
        for way, chooser in choices(args.device).items():
            columns = [measure(getattr(torch, dtype), rows, args, chooser) for rows in args.rows]
            sizes = f"{dtype}, V = {args.vocab}, {args.threads} threads"
            print(f"\n{way}, {sizes}; ms per step of S rows")
            print(f"{'S':22}" + "".join(f"{rows:9}" for rows in args.rows))
            for name in columns[0]:
                print(f"{name:22}" + "".join(f"{column[name]:9.2f}" for column in columns))


if __name__ == "__main__":
    main()
