# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"
"""Gated activations: both halves of a row are read once, the product is written once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.core.contracts.launches import launcher
from dovetail.platforms.gpu.ops.rows import Rows

__all__ = ["gelu_tanh_and_mul", "silu_and_mul"]

_BLOCK = 1024


def silu_and_mul(gate_up: Tensor) -> Tensor:
    """As the reference: the activation is rounded before it is multiplied."""
    return _gate(gate_up, tanh=False)


def gelu_tanh_and_mul(gate_up: Tensor) -> Tensor:
    """As the reference: the activation is rounded before it is multiplied."""
    return _gate(gate_up, tanh=True)


def _gate(gate_up: Tensor, *, tanh: bool) -> Tensor:
    rows, width = Rows.of(gate_up), gate_up.shape[-1] // 2
    shape = (*gate_up.shape[:-1], width)
    out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    if len(rows) and width:
        block = min(_BLOCK, triton.next_power_of_2(width))
        launcher(_activate, (len(rows), triton.cdiv(width, block)))(
            rows.tensor, out, *rows.steps, INNER=rows.inner, WIDTH=width, BLOCK=block, TANH=tanh
        )
    return out


@triton.jit
def _activate(
    x_ptr,
    out_ptr,
    outer_step,
    inner_step,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TANH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < WIDTH
    start = x_ptr + (row // INNER) * outer_step + (row % INNER) * inner_step
    gate = tl.load(start + column, mask, other=0.0).to(tl.float32)
    up = tl.load(start + WIDTH + column, mask, other=0.0).to(tl.float32)
    if TANH:
        # (1 + tanh(z)) / 2 is the logistic function of 2 z; 1.5957691 is 2 sqrt(2 / pi).
        slope = 1.5957691216057308 * (gate + 0.044715 * gate * gate * gate)
        active = gate / (1.0 + tl.exp(-slope))
    else:
        active = gate / (1.0 + tl.exp(-gate))
    dtype = out_ptr.dtype.element_ty
    out = active.to(dtype).to(tl.float32) * up
    tl.store(out_ptr + row * WIDTH + column, out.to(dtype), mask)
