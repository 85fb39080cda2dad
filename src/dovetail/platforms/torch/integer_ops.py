"""The torch references of linear layers over integer codes, with activations in 8 bits.

Sums of products of codes are taken as float32 has them exactly, below 2**24, on any device.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.core.contracts.ops import INT4_GROUP

__all__ = ["IntegerWeight", "in_8_bits", "int4_linear", "int4_weight", "int8_linear", "int8_weight"]

_LARGEST = 127
_EXACT = 1024
"""Inputs whose products of two codes add up to less than 2**24."""


class IntegerWeight(NamedTuple):
    """A weight as the references keep it: as it comes."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None


def int8_weight(codes: Tensor, scales: Tensor, bias: Tensor | None) -> IntegerWeight:
    """Nothing is packed."""
    return IntegerWeight(codes, scales, bias)


def int8_linear(x: Tensor, weight: IntegerWeight) -> Tensor:
    """Pieces of the sum are exact in float32, and added up as integers."""
    q, steps = in_8_bits(x)
    pieces = _products(q, weight.codes, _EXACT)
    total = reduce(torch.add, (piece.int() for piece in pieces))
    return _rounded(total.float() * steps * weight.scales, weight.bias, x)


def int4_weight(codes: Tensor, scales: Tensor, bias: Tensor | None) -> IntegerWeight:
    """Nothing is packed."""
    return IntegerWeight(codes, scales, bias)


def int4_linear(x: Tensor, weight: IntegerWeight) -> Tensor:
    """A product for each group."""
    q, steps = in_8_bits(x)
    codes = torch.stack((weight.codes & 15, weight.codes >> 4), -1).flatten(1).char() - 8
    groups = zip(_products(q, codes, INT4_GROUP), weight.scales.unbind(1), strict=True)
    total = reduce(torch.add, (product * scales for product, scales in groups))
    return _rounded(total * steps, weight.bias, x)


def in_8_bits(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (..., in) as float32, and the step (..., 1) of each row: see ``Ops.int8_linear``.

    The step of a row with NaN or an infinity is NaN, and so is what is computed with it.
    """
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True)
    # A division by a number may be a product with its reciprocal, which rounds differently.
    steps = largest / torch.full_like(largest, _LARGEST)
    steps = torch.where(steps < torch.finfo(torch.float32).tiny, 1.0, steps)
    steps = torch.where(largest.isfinite(), steps, torch.nan)
    return torch.round(wide / steps).nan_to_num(), steps


def _products(q: Tensor, codes: Tensor, size: int) -> Iterator[Tensor]:
    """``q @ codes.T`` for every so many inputs, in float32."""
    for part, columns in zip(torch.split(q, size, -1), torch.split(codes, size, -1), strict=True):
        yield functional.linear(part, columns.float())


def _rounded(out: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
    return (out if bias is None else out + bias.float()).to(x.dtype)
