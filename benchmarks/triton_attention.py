"""What tiles, warps and stages the Triton attention should have on the GPU that is here.

    python benchmarks/triton_attention.py --kernel decode --head-size 128 --heads 32 --kv-heads 8
    python benchmarks/triton_attention.py --kernel prefill --head-size 128 --rows 1 --lengths 8192
    python benchmarks/triton_attention.py --kernel decode --kv-dtype fp8_e4m3 --current

Each candidate is recorded into a graph and replayed, over as many layers as fill the caches of the
GPU many times; its worst ratio to the best of each workload decides. What is printed last is a line
of ``attention_backends/triton/tuning.toml``. Decoding is measured in the bytes of keys and values
that must be read, next to those that a plain copy reads and writes; prefill in the floating-point
operations of the keys that are seen. ``--current`` measures the table's own entry only.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from dovetail.attention_backends.kv_codec import CODECS
from dovetail.attention_backends.triton.backend import TritonAttention
from dovetail.attention_backends.triton.target import Target, absent, present_target
from dovetail.attention_backends.triton.tuning import HEAD_SIZES, Tile, kind_of
from dovetail.core.conformance.sequences import Piece, batch_of
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec

READ = 1 << 30
"""Bytes of keys and values that one replay reads, at least."""
BLOCK = 16


@dataclass(frozen=True)
class Workload:
    """Rows of up to one length, in a step in which they decode, or prefill from the beginning."""

    kernel: str
    rows: int
    length: int
    spread: float
    """The shortest rows are shorter than the longest by this share."""
    spec: AttentionSpec
    need: AttentionNeed

    def lengths(self) -> list[int]:
        least = max(1, round(self.length * (1 - self.spread)))
        return np.random.default_rng(0).integers(least, self.length + 1, self.rows).tolist()

    def batch_pieces(self) -> list[Piece]:
        starts = [length - 1 if self.kernel == "decode" else 0 for length in self.lengths()]
        ends = zip(starts, self.lengths(), strict=True)
        return [Piece(row, start, end - start) for row, (start, end) in enumerate(ends)]

    def layer_bytes(self, backend: TritonAttention) -> int:
        per_position = backend.bytes_per_block(self.spec, self.need) / BLOCK
        seen = (min(length, self.spec.window or length) for length in self.lengths())
        return int(sum(seen) * per_position)

    def layer_flops(self) -> float:
        seen = 0.0
        for length in self.lengths():
            window = min(length, self.spec.window or length)
            seen += window * (window + 1) / 2 + (length - window) * window
        return 4.0 * seen * self.spec.num_heads * self.spec.head_size

    def rate(self, backend: TritonAttention, seconds: float) -> tuple[float, str]:
        """Of one layer."""
        if self.kernel == "decode":
            return self.layer_bytes(backend) / seconds / 1e12, "TB/s"
        return self.layer_flops() / seconds / 1e12, "TFLOP/s"


def measure(work: Workload, device: torch.device, target: Target) -> float:
    """Seconds of one layer: its KV write and its attention."""
    from triton.testing import do_bench_cudagraph

    backend = TritonAttention(device, target=target)
    width = -(-max(work.lengths()) // BLOCK)
    order = np.random.default_rng(0).permutation(work.rows * width) + 1
    batch = batch_of(work.batch_pieces(), order.reshape(work.rows, width).astype(np.int32), BLOCK)
    count = max(1, math.ceil(READ / work.layer_bytes(backend))) if work.kernel == "decode" else 1
    caches = [backend.allocate(work.spec, work.need, order.size + 1) for _ in range(count)]
    heads = [work.spec.num_heads, work.spec.num_kv_heads, work.spec.num_kv_heads]
    dtype = getattr(torch, work.need.dtype)
    shape = (batch.num_tokens, sum(heads), work.spec.head_size)
    q, k, v = torch.randn(shape, device=device, dtype=dtype).split(heads, 1)
    plan = backend.plan(batch, work.need)
    torch.cuda.synchronize()  # What follows runs on another stream.

    def layers() -> None:
        for cache in caches:
            backend.attend(q, k, v, cache, plan, work.spec)

    return float(do_bench_cudagraph(layers, rep=50)) / 1e3 / count


def copied(device: torch.device) -> float:
    """TB/s that a copy reads and writes together."""
    from triton.testing import do_bench

    source = torch.ones(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    milliseconds = float(do_bench(lambda: target.copy_(source), return_mode="median"))
    return 2 * source.numel() / (milliseconds / 1e3) / 1e12


def candidates(kernel: str, rows: int) -> Iterator[Tile]:
    """Those worth a try; ``rows`` of decoding is what the table has: it is no matter of speed."""
    tiles = (rows,) if kernel == "decode" else (64, 128)
    for size, keys, warps, stages in itertools.product(
        tiles, (16, 32, 64, 128), (4, 8), (1, 2, 3, 4, 5)
    ):
        if kernel == "decode" or keys > 16:
            yield Tile(rows=size, keys=keys, warps=warps, stages=stages)


def choose(works: list[Workload], device: torch.device, kind: str, *, current: bool) -> None:
    from triton.runtime.errors import OutOfResources

    here = present_target(device)
    kernel, size = works[0].kernel, works[0].spec.head_size
    known = here.tuning.tile(kernel, size, kind)
    head_class = next(limit for limit in HEAD_SIZES if size <= limit)
    seconds: dict[Tile, list[float]] = {}
    for tile in [known] if current else dict.fromkeys([known, *candidates(kernel, known.rows)]):
        tiles = {**here.tuning.tiles, (kernel, head_class, kind): tile}
        target = replace(here, tuning=replace(here.tuning, tiles=tiles))
        try:
            seconds[tile] = [measure(work, device, target) for work in works]
        except OutOfResources as error:
            print(f"{tile}: {str(error).splitlines()[0]}")
            continue
        print(tile, *(f"{1e6 * taken:.1f} us" for taken in seconds[tile]), flush=True)
    best = [min(taken) for taken in zip(*seconds.values(), strict=True)]

    def worst(tile: Tile) -> float:
        return max(taken / least for taken, least in zip(seconds[tile], best, strict=True))

    chosen, backend = min(seconds, key=worst), TritonAttention(device)
    print(f"\ncopy: {copied(device):.2f} TB/s read and written")
    for work, taken in zip(works, seconds[chosen], strict=True):
        rate, unit = work.rate(backend, taken)
        print(f"{kernel} of {work.rows} x {work.length}: {1e6 * taken:.1f} us, {rate:.2f} {unit}")
    print(f"\n[{here.architecture}.{kernel}.{head_class}]")
    print(
        f"{kind} = {{ rows = {chosen.rows}, keys = {chosen.keys},"
        f" warps = {chosen.warps}, stages = {chosen.stages} }}"
    )


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernel", choices=["decode", "prefill"], required=True)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--window", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kv-dtype", default=None)
    parser.add_argument("--rows", type=numbers, default=[1, 16, 128])
    parser.add_argument("--lengths", type=numbers, default=[1024, 8192])
    parser.add_argument("--spread", type=float, default=0.0, help="rows are shorter by up to this")
    parser.add_argument("--current", action="store_true")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    reason = "there is only a CPU" if device.type == "cpu" else absent(device)
    if reason is not None:
        raise SystemExit(f"This measures kernels on a GPU, and none can be used: {reason}.")
    spec = AttentionSpec(
        layer=0,
        num_heads=given.heads,
        num_kv_heads=given.kv_heads,
        head_size=given.head_size,
        scale=given.head_size**-0.5,
        window=given.window,
    )
    kv_dtype = given.kv_dtype or given.dtype
    need = AttentionNeed(specs=(spec,), dtype=given.dtype, kv_dtype=kv_dtype, block_size=BLOCK)
    refusal = TritonAttention(device).refuses(need)
    if refusal is not None:
        raise SystemExit(f"The backend does not serve this: {refusal}.")
    works = [
        Workload(given.kernel, rows, length, given.spread, spec, need)
        for rows, length in itertools.product(given.rows, given.lengths)
    ]
    kind = kind_of(floats=given.dtype == "float32", coded=kv_dtype in CODECS)
    choose(works, device, kind, current=given.current)


if __name__ == "__main__":
    main()
