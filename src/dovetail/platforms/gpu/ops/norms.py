# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"
"""Norms over the last axis: a row is read once, normed in float32, and written once.

Rows need not lie next to each other: the heads of a query inside a buffer of queries, keys and
values are read where they are. Short rows share a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dovetail.core.contracts.launches import launcher
from dovetail.core.errors import UnsupportedError
from dovetail.platforms.gpu.ops.rows import Rows

__all__ = ["add_rms_norm", "layer_norm", "rms_norm"]

_AT_ONCE = 2048
"""Elements of a program that takes several rows."""
_LONGEST = 1 << 15


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """As the reference: normed in float32, then multiplied in the weight's dtype."""
    rows, out = Rows.of(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        shape = _shape(rows.width)
        launcher(_rms_norm, rows.grid(shape["ROWS"]))(
            rows.tensor, weight, out, eps, len(rows), *rows.steps, INNER=rows.inner, **shape
        )
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """As the reference: the sum is rounded before it is normed."""
    dtype = torch.promote_types(x.dtype, residual.dtype)
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    total = torch.empty_like(out)
    rows, others = Rows.of(x), Rows.of(residual)
    if len(rows):
        shape = _shape(rows.width)
        launcher(_add_rms_norm, rows.grid(shape["ROWS"]))(
            rows.tensor,
            others.tensor,
            weight,
            out,
            total,
            eps,
            len(rows),
            *rows.steps,
            *others.steps,
            INNER=rows.inner,
            **shape,
        )
    return out, total


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Mean and variance, weight and bias in float32; one rounding at the end."""
    rows, out = Rows.of(x), torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if len(rows):
        shape = _shape(rows.width)
        launcher(_layer_norm, rows.grid(shape["ROWS"]))(
            rows.tensor,
            weight,
            weight if bias is None else bias,
            out,
            eps,
            len(rows),
            *rows.steps,
            INNER=rows.inner,
            BIASED=bias is not None,
            **shape,
        )
    return out


def _shape(width: int) -> dict[str, int]:
    """The constants of a launch for rows of this width."""
    if width > _LONGEST:
        raise UnsupportedError(
            f"The norm of rows of {width} entries has no kernel: they may have {_LONGEST}."
        )
    block = triton.next_power_of_2(width)
    rows = max(1, _AT_ONCE // block)
    warps = min(16, max(4, block // 512))
    return {"WIDTH": width, "BLOCK": block, "ROWS": rows, "num_warps": warps}


@triton.jit
def _starts(num_rows, outer_step, inner_step, INNER: tl.constexpr, ROWS: tl.constexpr):
    """Numbers of a program's rows (R, 1), which of them are there, and where they start."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    start = (row // INNER).to(tl.int64) * outer_step + (row % INNER) * inner_step
    return row.to(tl.int64), row < num_rows, start


@triton.jit
def _normed(x, weight, eps, WIDTH: tl.constexpr):
    """Float32 rows (R, C), zero beyond their width, normed and weighted."""
    scale = tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / WIDTH + eps)
    dtype = weight.dtype
    return ((x * scale).to(dtype).to(tl.float32) * weight.to(tl.float32)).to(dtype)


@triton.jit(do_not_specialize=["eps", "num_rows"])
def _rms_norm(
    x_ptr,
    weight_ptr,
    out_ptr,
    eps,
    num_rows,
    outer_step,
    inner_step,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, there, start = _starts(num_rows, outer_step, inner_step, INNER, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    mask = there & (column < WIDTH)
    x = tl.load(x_ptr + start + column, mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, column < WIDTH, other=0.0)
    out = _normed(x, weight, eps, WIDTH)
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["eps", "num_rows"])
def _add_rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    total_ptr,
    eps,
    num_rows,
    outer_step,
    inner_step,
    residual_outer_step,
    residual_inner_step,
    INNER: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, there, start = _starts(num_rows, outer_step, inner_step, INNER, ROWS)
    _, _, other = _starts(num_rows, residual_outer_step, residual_inner_step, INNER, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    mask = there & (column < WIDTH)
    weight = tl.load(weight_ptr + column, column < WIDTH, other=0.0)
    x = tl.load(x_ptr + start + column, mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + other + column, mask, other=0.0).to(tl.float32)
    total = (x + residual).to(total_ptr.dtype.element_ty)
    tl.store(total_ptr + row * WIDTH + column, total, mask)
    out = _normed(total.to(tl.float32), weight, eps, WIDTH)
    tl.store(out_ptr + row * WIDTH + column, out.to(out_ptr.dtype.element_ty), mask)


@triton.jit(do_not_specialize=["eps", "num_rows"])
def _layer_norm(
    x_ptr,
    weight_ptr,
    bias_ptr,
    out_ptr,
    eps,
    num_rows,
    outer_step,
    inner_step,
    INNER: tl.constexpr,
    BIASED: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    row, there, start = _starts(num_rows, outer_step, inner_step, INNER, ROWS)
    column = tl.arange(0, BLOCK)[None, :]
    inside = column < WIDTH
    mask = there & inside
    dtype = out_ptr.dtype.element_ty
    x = tl.load(x_ptr + start + column, mask, other=0.0).to(tl.float32)
    centred = tl.where(inside, x - tl.sum(x, axis=1, keep_dims=True) / WIDTH, 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, axis=1, keep_dims=True) / WIDTH + eps)
    weight = tl.load(weight_ptr + column, inside, other=0.0).to(dtype).to(tl.float32)
    out = centred * scale * weight
    if BIASED:
        out += tl.load(bias_ptr + column, inside, other=0.0).to(dtype).to(tl.float32)
    tl.store(out_ptr + row * WIDTH + column, out.to(dtype), mask)
