"""Linear layers over weights of 8 and 4 bits, in panels, by the compiled kernels."""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from functools import cached_property
from typing import ClassVar

import torch
from torch import Tensor

from dovetail.core.contracts.ops import INT4_GROUP
from dovetail_cpu.kernels import Int4Struct, Int8Struct, Kernels, QuantizedStruct, TargetStruct
from dovetail_cpu.linear import PanelLayer, padded, padded_bias, panels
from dovetail_cpu.memory import HugePages

__all__ = ["Int4Panels", "Int8Panels", "IntegerPanels"]

_WORD = 4
"""Inputs of 8 bits."""
_HIGHER = 128
"""What is added to activations, so that they are bytes without a sign."""


class IntegerPanels(PanelLayer):
    """``x @ W.T + b`` as ``Ops.int8_linear`` and ``int4_linear`` say."""

    struct: ClassVar[type[ctypes.Structure]]
    """Of ``weight``."""

    @cached_property
    def weight(self) -> ctypes.Structure:
        """As the kernel reads it."""
        return self.struct(*self._addresses, self.num_inputs)

    @abstractmethod
    def multiply(self, quantized: int, num_rows: int, target: int) -> None:
        """Call the kernel, with the addresses of its structures."""

    def num_groups(self) -> int:
        """Groups of inputs whose codes are to be added up; 0: none are."""
        return 0

    def _product(self, x: Tensor, width: int, gate: int) -> Tensor:
        if x.dtype not in (torch.bfloat16, torch.float32):
            return self._product(x.float(), width, gate).to(x.dtype)
        wide = x.dtype is torch.float32
        rows = (x if x.dim() == 2 else x.reshape(-1, self.num_inputs)).contiguous()
        num_rows = len(rows)
        codes = torch.empty(num_rows, -(-self.num_inputs // _WORD) * _WORD, dtype=torch.uint8)
        steps = torch.empty(num_rows)
        groups = self.num_groups()
        sums = torch.empty(num_rows, groups, dtype=torch.int32) if groups else None
        at = QuantizedStruct(
            codes.data_ptr(), steps.data_ptr(), None if sums is None else sums.data_ptr()
        )
        self._kernels.quantize(
            rows.data_ptr(),
            wide,
            self.num_inputs,
            num_rows,
            self.num_inputs,
            at.codes,
            at.steps,
            at.group_sums,
        )
        out = x.new_empty(num_rows, width)
        bias = self._bias_address
        target = TargetStruct(out.data_ptr(), wide, width, self.num_columns, bias, gate)
        for held in (at, target):
            self._kernels.tape.keep(held)
        self.multiply(ctypes.addressof(at), num_rows, ctypes.addressof(target))
        return out if x.dim() == 2 else out.view(*x.shape[:-1], width)


class Int8Panels(IntegerPanels):
    """Codes of 8 bits.

    Args:
        kernels: For this processor.
        memory: For the panels.
        codes: (out, in) int8. May be dropped.
        scales: (out,) float32.
        bias: (out,) or None.
    """

    kind = "int8"
    struct = Int8Struct

    def __init__(
        self,
        kernels: Kernels,
        memory: HugePages,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
    ) -> None:
        num_columns, num_inputs = codes.shape
        missing = -num_inputs % _WORD
        whole = torch.nn.functional.pad(codes, (0, missing)) if missing else codes
        wide = padded(scales.float())
        sums = torch.empty(len(wide), dtype=torch.int32)
        words = panels(kernels, memory, [whole.contiguous().view(torch.int32)], sums)
        arrays = words, wide, sums * _HIGHER
        self._hold(kernels, (num_columns, num_inputs), arrays, padded_bias(bias))

    def multiply(self, quantized: int, num_rows: int, target: int) -> None:
        """See ``IntegerPanels``."""
        self._kernels.int8_linear(quantized, num_rows, ctypes.addressof(self.weight), target)


class Int4Panels(IntegerPanels):
    """Codes of 4 bits.

    Args:
        kernels: For this processor.
        memory: For the panels.
        codes: (out, in / 2) uint8, as ``Ops.int4_weight`` says. May be dropped.
        scales: (out, in / ``INT4_GROUP``) float32.
        bias: (out,) or None.
    """

    kind = "int4"
    struct = Int4Struct

    def __init__(
        self,
        kernels: Kernels,
        memory: HugePages,
        codes: Tensor,
        scales: Tensor,
        bias: Tensor | None,
    ) -> None:
        arrays = (
            panels(kernels, memory, [_words_of_eight(codes)]),
            panels(kernels, memory, [scales.float().contiguous().view(torch.int32)]),
        )
        self._hold(kernels, (len(codes), 2 * codes.shape[1]), arrays, padded_bias(bias))

    def num_groups(self) -> int:
        """See ``IntegerPanels``."""
        return self.num_inputs // INT4_GROUP

    def multiply(self, quantized: int, num_rows: int, target: int) -> None:
        """See ``IntegerPanels``."""
        self._kernels.int4_linear(quantized, num_rows, ctypes.addressof(self.weight), target)


def _words_of_eight(codes: Tensor) -> Tensor:
    """Words (out, in / 8) int32: low halves of bytes the first four inputs, high ones the others.

    Args:
        codes: (out, in / 2) uint8, neighbours to a byte.
    """
    pairs = codes.view(len(codes), -1, 2, 2)
    first, others = pairs[:, :, 0], pairs[:, :, 1]
    words = torch.empty(len(codes), codes.shape[1] // 4, 4, dtype=torch.uint8)
    words[..., 0::2] = first & 15 | (others & 15) << 4
    words[..., 1::2] = first >> 4 | others & 0xF0
    return words.view(torch.int32)[..., 0]
