"""Sequences through the kernels, compared with the readable backend on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.attention_backends.triton.backend import TritonAttention
from tests.attention_backends.sequences import Piece, Sequences, make_need, make_spec

CPU = torch.device("cpu")
LENGTHS = (1, 5, 34)
TOLERANCE = {"float32": 3e-6, "float16": 3e-3, "bfloat16": 3e-2}
SPECS: dict[str, dict[str, Any]] = {
    "grouped": {},
    "one KV head": {"heads": 7, "kv_heads": 1, "size": 20},
    "as many KV heads": {"heads": 3, "kv_heads": 3, "size": 24},
    "window": {"window": 20},
    "soft cap": {"soft_cap": 2.0},
    "window and soft cap": {"window": 30, "soft_cap": 5.0},
    "alibi": {"alibi_slopes": (0.5, 0.25, 0.125, 0.0625)},
}


def make_work(
    lengths: Sequence[int] = LENGTHS,
    *,
    dtype: str = "float32",
    kv_dtype: str = "",
    block_size: int = 16,
    **spec: Any,
) -> Sequences:
    made = make_spec(**spec)
    need = make_need(made, dtype=dtype, kv_dtype=kv_dtype or dtype, block_size=block_size)
    return Sequences(made, need, lengths)


def wanted(work: Sequences) -> list[Tensor]:
    """What the readable backend gives for each sequence in one piece."""
    return work.run(ReferenceAttention(CPU), work.whole())


def ran(work: Sequences, device: torch.device, steps: Sequence[Sequence[Piece]]) -> list[Tensor]:
    """What the kernels give, on the CPU."""
    backend = TritonAttention(device)
    assert backend.refuses(work.need) is None
    on_device = moved(work, device)
    return [part.cpu() for part in on_device.run(backend, steps)]


def moved(work: Sequences, device: torch.device) -> Sequences:
    """The same sequences on the device."""
    there = Sequences(work.spec, work.need, work.lengths)
    there.tables = work.tables
    for side in ("q", "k", "v"):
        setattr(there, side, [part.to(device) for part in getattr(work, side)])
    return there


def check_near(got: Sequence[Tensor], want: Sequence[Tensor], tolerance: float) -> None:
    for ours, theirs in zip(got, want, strict=True):
        assert torch.isfinite(ours).all()
        off = (ours.float() - theirs.float()).abs() / theirs.float().abs().clamp(min=1)
        assert off.max() <= tolerance, f"off by {off.max()}, of a sequence of {len(theirs)}"


def last_tokens(work: Sequences, count: int = 3) -> list[list[Piece]]:
    """The beginnings in one step, then the last tokens one at a time."""
    starts = [max(1, n - count) for n in work.lengths]
    steps = [[(i, 0, start) for i, start in enumerate(starts)]]
    for number in range(count):
        left = enumerate(zip(starts, work.lengths, strict=True))
        steps.append([(i, a + number, 1) for i, (a, n) in left if a + number < n])
    return [pieces for pieces in steps if pieces]
