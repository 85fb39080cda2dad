"""What the dtype of the KV cache costs: time to attend, and bytes per token.

    OMP_NUM_THREADS=1 python benchmarks/kv_cache.py --processor-time

One layer of the shape of Qwen2 0.5B. ``decode`` is one token of each row, ``prefill`` the last 256
tokens of one row. Times are the best of several, in milliseconds; ``x`` is next to a cache of the
activations' dtype.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch

from dovetail.attention_backends.invariant import InvariantAttention
from dovetail.attention_backends.sdpa import SdpaAttention
from dovetail.core.batch import Batch, SamplingBatch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec

BLOCK = 32
SPEC = AttentionSpec(layer=0, num_heads=14, num_kv_heads=2, head_size=64, scale=0.125)
NONE = np.zeros(0, np.int32)
NO_FLOATS = np.zeros(0, np.float32)


def make_batch(rows: int, context: int, count: int) -> Batch:
    width = -(-(context + count) // BLOCK)
    return Batch(
        step=0,
        rows=np.arange(rows, dtype=np.int32),
        query_lens=np.full(rows, count, np.int32),
        context_lens=np.full(rows, context, np.int32),
        block_tables=np.arange(1, rows * width + 1, dtype=np.int32).reshape(rows, width),
        token_ids=np.zeros(rows * count, np.int32),
        carried=NONE,
        carried_rows=NONE,
        sampled=NONE,
        sampling=SamplingBatch.greedy(0),
        copies=np.zeros((0, 2), np.int32),
    )


@torch.inference_mode()
def measure(
    backend: SdpaAttention | InvariantAttention,
    need: AttentionNeed,
    batch: Batch,
    clock: Callable[[], float],
) -> float:
    cache = backend.allocate(SPEC, need, int(batch.block_tables.max()) + 1)
    dtype = getattr(torch, need.dtype)
    q, k, v = (torch.randn(batch.num_tokens, heads, 64).to(dtype) for heads in (14, 2, 2))
    best = float("inf")
    for _ in range(8):
        plan = backend.plan(batch, need)
        start = clock()
        backend.attend(q, k, v, cache, plan, SPEC)
        best = min(best, clock() - start)
    return best * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--processor-time", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.processor_time else time.perf_counter
    steps = {
        "decode 1": make_batch(1, args.context, 1),
        "decode 8": make_batch(8, args.context, 1),
        "decode 32": make_batch(32, args.context, 1),
        "prefill 256": make_batch(1, args.context, 256),
    }
    cpu = torch.device("cpu")
    for backend in (SdpaAttention(cpu), InvariantAttention(cpu)):
        print(f"\n{backend.name:22} bytes/token" + "".join(f"{name:>16}" for name in steps))
        plain: dict[str, float] = {}
        for kv_dtype in (args.dtype, "int8", "fp8_e4m3", "fp8_e5m2"):
            need = AttentionNeed(
                specs=(SPEC,), dtype=args.dtype, kv_dtype=kv_dtype, block_size=BLOCK
            )
            size = backend.bytes_per_block(SPEC, need) / BLOCK
            line = f"{kv_dtype:22} {size:11.0f}"
            for name, batch in steps.items():
                took = measure(backend, need, batch, clock)
                line += f"{took:9.2f} x {took / plain.setdefault(name, took):4.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
