"""Which kernels the time of a decode step goes to, on a GPU.

    python -m benchmarks.gpu_profile --shape qwen3-0.6b --batch-size 256 --input-len 512

`dovetail bench profile` times ops one by one, which a recorded step does not consist of. This looks
at recorded steps as they run: torch's profiler takes down the kernels of ten of them, between steps
that nobody watches, whose time is told beside it. Weights are random.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.shapes import SHAPES, write_config
from dovetail.core.batch import Batch
from dovetail.core.bench.workloads import Lengths, random_samples
from dovetail.core.cli.offline import Offline, start_offline
from dovetail.core.config.schema import EngineConfig

_SKIPPED, _WATCHED = 3, 10
"""Decode steps of a full batch: before those that are watched, and those."""


def watcher(batch_size: int, kernels: profile) -> Callable[[Batch], None]:
    """Told of every step before it starts; watches the middle ones."""
    seen = 0

    def on_step(batch: Batch) -> None:
        nonlocal seen
        if batch.num_tokens == batch.num_rows == batch_size:
            seen += 1
            if seen in (_SKIPPED, _SKIPPED + _WATCHED):
                torch.cuda.synchronize()
                (kernels.start if seen == _SKIPPED else kernels.stop)()

    return on_step


def decode(offline: Offline, args: argparse.Namespace, output_len: int) -> None:
    lengths = Lengths(input_len=args.input_len, output_len=output_len)
    rng = np.random.default_rng(0)
    samples = random_samples(args.batch_size, lengths, offline.vocab_size, rng)
    offline.llm.reset_prefix_cache()
    offline.meter.clear()
    offline.generate(samples, args.temperature, detokenize=False)


def report(events: Sequence[Any], most: int) -> None:
    times: dict[str, list[float]] = defaultdict(list)
    spans = []
    for event in events:
        if event.device_type == DeviceType.CUDA:
            times[event.name].append(event.device_time_total)
            spans.append((event.time_range.start, event.time_range.end))
    if not spans:
        raise SystemExit("No kernel was seen: there were too few steps in which every row decodes.")
    busy, reached = 0.0, 0.0
    for start, end in sorted(spans):
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = reached - min(start for start, _ in spans)
    print(f"the GPU is busy for {busy / whole:.1%} of {whole / _WATCHED:.0f} us a step")
    print(f"{'us a step':>10} {'calls':>6} {'us each':>8}  kernel")
    for name, taken in sorted(times.items(), key=lambda item: -sum(item[1]))[:most]:
        calls = len(taken) / _WATCHED
        print(f"{sum(taken) / _WATCHED:10.1f} {calls:6.1f} {statistics.mean(taken):8.1f}  {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--temperature", type=float, default=0.6)
    parser.add_argument("--kernels", type=int, default=25, help="how many are shown")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("there is no GPU here that torch can use")
    # The first rows decode while the last prompts are computed, 4096 tokens a step at least.
    output_len = 40 + args.batch_size * args.input_len // 4096
    with tempfile.TemporaryDirectory() as folder:
        config = EngineConfig(
            model=str(write_config(Path(folder), SHAPES[args.shape])),
            device=args.device,
            load_format="dummy",
            skip_tokenizer_init=True,
            max_num_seqs=max(args.batch_size, 8),
            max_model_len=args.input_len + output_len,
        )
        offline = start_offline(config, with_tokenizer=False)
        decode(offline, args, 4)
        decode(offline, args, output_len)
        plain = offline.meter.times.decodes(args.batch_size)
        print(
            f"{args.shape}, {args.batch_size} rows: {1e6 * statistics.median(plain):.0f} us a step"
        )
        kernels = profile(activities=[ProfilerActivity.CUDA])
        offline.meter.on_step = watcher(args.batch_size, kernels)
        decode(offline, args, output_len)
        report(kernels.events() or [], args.kernels)


if __name__ == "__main__":
    main()
