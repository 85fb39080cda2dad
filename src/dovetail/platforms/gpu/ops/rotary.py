# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"
"""Rotary embedding: heads are read where they are and each entry once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.core.contracts.launches import launcher

__all__ = ["rotary"]

_AT_ONCE = 2048
"""Pairs of a program."""


def rotary(x_THE: Tensor, cos_TF: Tensor, sin_TF: Tensor) -> Tensor:
    """As the reference, computed in float32; one rounding at the end."""
    tokens, heads, entries = x_THE.shape
    half = cos_TF.shape[-1]
    x, cos, sin = _dense(x_THE), _dense(cos_TF), _dense(sin_TF)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(max(1, half))
        each = min(triton.next_power_of_2(heads), max(1, _AT_ONCE // block))
        launcher(_rotate, (tokens, triton.cdiv(heads, each)))(
            x,
            cos,
            sin,
            out,
            x.stride(0),
            x.stride(1),
            cos.stride(0),
            sin.stride(0),
            NUM_HEADS=heads,
            ENTRIES=entries,
            HALF=half,
            BLOCK=block,
            REST=triton.next_power_of_2(max(1, entries - 2 * half)),
            HEADS=each,
        )
    return out


def _dense(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@triton.jit
def _rotate(
    x_ptr,
    cos_ptr,
    sin_ptr,
    out_ptr,
    token_step,
    head_step,
    cos_step,
    sin_step,
    NUM_HEADS: tl.constexpr,
    ENTRIES: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
    HEADS: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    x_ptr += token * token_step + head * head_step
    out_ptr += (token * NUM_HEADS + head) * ENTRIES
    there = head < NUM_HEADS
    pair = tl.arange(0, BLOCK)[None, :]
    mask = there & (pair < HALF)
    cos = tl.load(cos_ptr + token * cos_step + pair, pair < HALF, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_step + pair, pair < HALF, other=0.0).to(tl.float32)
    a = tl.load(x_ptr + pair, mask, other=0.0).to(tl.float32)
    b = tl.load(x_ptr + HALF + pair, mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + pair, (a * cos - b * sin).to(dtype), mask)
    tl.store(out_ptr + HALF + pair, (b * cos + a * sin).to(dtype), mask)
    if ENTRIES > 2 * HALF:
        entry = 2 * HALF + tl.arange(0, REST)[None, :]
        mask = there & (entry < ENTRIES)
        tl.store(out_ptr + entry, tl.load(x_ptr + entry, mask, other=0.0), mask)
