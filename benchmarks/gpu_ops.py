"""Time of the fused ops and of the choice on a GPU, next to their torch references.

    python benchmarks/gpu_ops.py --rows 1 64 256

Each case is recorded as a graph and replayed, with the caches overwritten before, so that neither
launches nor what an earlier run has left there count. Reference and kernel take turns; the ratio is
the median of the ratios of neighbours. Bytes are what must be read and written at least: logits
count once for greedy rows and twice for rows that draw. Widths are those of an 8B Llama.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from sampler import model_logits
from torch import Tensor

from dovetail.core.contracts.ops import OpTable
from dovetail.core.sampling.noise import uniform
from dovetail.platforms.gpu.ops import override_ops
from dovetail.platforms.torch.ops import references
from dovetail.platforms.torch.sampling.fixed import choose_fixed
from dovetail.platforms.torch.sampling.weights import Controls

DEVICE = "cuda"
Call = Callable[[], object]
DRAWS: dict[str, tuple[float, int, float]] = {
    "greedy": (0.0, 0, 1.0),
    "temperature 0.8": (0.8, 0, 1.0),
    "top_k 50, top_p 0.9": (0.8, 50, 0.9),
    "top_p 0.95": (1.0, 0, 0.95),
    "top_p 0.95, flat": (1.0, 0, 0.95),
}
"""Temperature, top_k and top_p."""


@dataclass(frozen=True)
class Case:
    """One op with its arguments."""

    name: str
    reference: Call
    kernel: Call
    num_bytes: int


def op_cases(rows: int, dtype: torch.dtype) -> Iterator[Case]:
    table = OpTable(references())
    override_ops(table, "benchmark")
    make = partial(filled, dtype=dtype)
    x, other, weight = make(rows, 4096), make(rows, 4096), make(4096)
    heads = make(rows, 6144)[:, :4096].view(rows, 32, 128)
    cos, sin = (filled(rows, 64, dtype=torch.float32) for _ in range(2))
    gate_up = make(rows, 28672)
    calls: dict[str, tuple[object, ...]] = {
        "rms_norm": (x, weight, 1e-5),
        "add_rms_norm": (x, other, weight, 1e-5),
        "layer_norm": (x, weight, weight, 1e-5),
        "rotary": (heads, cos, sin),
        "silu_and_mul": (gate_up,),
        "gelu_tanh_and_mul": (gate_up,),
    }
    for name, arguments in calls.items():
        reference = partial(table.references[name], *arguments)
        kernel = partial(table.overrides[name].function, *arguments)
        yield Case(name, reference, kernel, num_bytes((*arguments, kernel())))


def choice_cases(rows: int, vocab: int, dtype: torch.dtype) -> Iterator[Case]:
    from dovetail.platforms.gpu.ops.choice import choose

    noise = uniform(np.arange(rows, dtype=np.uint64), np.arange(rows))
    for name, (temperature, top_k, top_p) in DRAWS.items():
        logits = model_logits(rows, vocab, flat="flat" in name).to(DEVICE, dtype)
        fields = (temperature, -np.inf, top_k or vocab, top_p)
        table = np.stack([*(np.full(rows, field) for field in fields), noise]).astype(np.float32)
        controls = Controls.unpack(torch.from_numpy(table).to(DEVICE))
        known = None if temperature == 0 else controls
        restricts = bool(top_k) or top_p < 1
        reference = partial(choose_fixed, logits, known, restricts=restricts)
        kernels = partial(choose, logits, known, restricts=restricts)
        if different := int((kernels()[0] != reference()[0]).sum()):
            print(f"{name}: {different} of {rows} tokens are not those of the reference")
        reads = 1 if temperature == 0 else 2
        yield Case(f"choose, {name}", reference, kernels, reads * num_bytes((logits,)))


def filled(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def num_bytes(values: Sequence[object]) -> int:
    total = 0
    for value in values:
        if isinstance(value, tuple):
            total += num_bytes(value)
        elif isinstance(value, Tensor):
            total += value.numel() * value.element_size()
    return total


def recorded(call: Call) -> Call:
    """A graph of one call, after some calls in which what is compiled gets compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def microseconds(call: Call, spoiler: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    spoiler.zero_()
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def measure(case: Case, repeats: int, spoiler: Tensor) -> None:
    reference, kernel = recorded(case.reference), recorded(case.kernel)
    pairs = [
        (microseconds(reference, spoiler), microseconds(kernel, spoiler)) for _ in range(repeats)
    ]
    slow, fast = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(theirs / ours for theirs, ours in pairs)
    rate = case.num_bytes / fast / 1e3
    print(f"{case.name:28} {slow:9.1f} us {fast:9.1f} us {ratio:7.2f}x {rate:8.0f} GB/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--logits", choices=("bfloat16", "float16", "float32"), default="float32")
    parser.add_argument("--repeats", type=int, default=50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit(
            "There is no GPU here that torch can use: these kernels are measured on one. "
            "Run this on a machine with a GPU and a torch that was built for it."
        )
    spoiler = torch.empty(1 << 28, dtype=torch.uint8, device=DEVICE)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    for rows in args.rows:
        print(f"\n{rows} rows{'':22} reference    kernel     ratio   achieved")
        for case in op_cases(rows, getattr(torch, args.dtype)):
            measure(case, args.repeats, spoiler)
        for case in choice_cases(rows, args.vocab, getattr(torch, args.logits)):
            measure(case, args.repeats, spoiler)


if __name__ == "__main__":
    with torch.inference_mode():
        main()
