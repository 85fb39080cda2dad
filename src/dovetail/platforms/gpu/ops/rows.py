# mypy: disable-error-code="import-untyped"
"""Rows of a tensor, wherever they lie."""

from __future__ import annotations

from dataclasses import dataclass

import triton
from torch import Tensor

__all__ = ["Rows"]


@dataclass(frozen=True)
class Rows:
    """The last axis of a tensor of any shape, as rows under two leading axes.

    Kernels find row r at ``r // inner`` steps of the outer axis and ``r % inner`` of the inner.
    """

    tensor: Tensor
    """(outer, inner, width), entries of a row next to each other."""

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        """No copy for up to three axes whose last is dense, nor for what is dense altogether."""
        width = x.shape[-1]
        if x.ndim < 3:
            x = x.reshape(-1, 1, width)
        elif x.ndim > 3:
            x = x.reshape(-1, x.shape[-2], width)
        return cls(x if x.stride(-1) == 1 or width == 1 else x.contiguous())

    def __len__(self) -> int:
        return self.tensor.shape[0] * self.tensor.shape[1] if self.width else 0

    @property
    def width(self) -> int:
        """Entries of a row."""
        return self.tensor.shape[2]

    @property
    def inner(self) -> int:
        """Rows of each step along the outer axis."""
        return self.tensor.shape[1]

    @property
    def steps(self) -> tuple[int, int]:
        """From one row to the next along the outer axis, and along the inner."""
        return self.tensor.stride(0), self.tensor.stride(1)

    def grid(self, each: int) -> tuple[int]:
        """Programs, of ``each`` rows."""
        return (triton.cdiv(len(self), each),)
