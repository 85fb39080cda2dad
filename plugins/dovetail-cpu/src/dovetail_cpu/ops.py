"""Ops by the compiled kernels, for bfloat16; the references serve other dtypes."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from dovetail.core.contracts.ops import OpTable
from dovetail.platforms.torch.ops import QuantizedLinear, references
from dovetail.platforms.torch.platform import BoundLinear
from dovetail.quant.int4 import Int4
from dovetail.quant.int8 import Int8
from dovetail_cpu.integers import Int4Panels, Int8Panels, IntegerPanels
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.linear import GATES, PanelLayer
from dovetail_cpu.memory import HugePages

__all__ = ["override_ops"]

_NORM_WEIGHTS = (torch.bfloat16, torch.float32)
_POINTWISE = ("relu", "scale", "soft_cap", "silu", "gelu", "gelu_tanh")
"""In the order of their numbers (native/elementwise.h)."""
_BOUND_ALONE = (Int8, Int4)
"""Schemes that do nothing but apply what a layer is bound to; one derived from them may."""


def override_ops(table: OpTable, kernels: Kernels, memory: HugePages, origin: str) -> None:
    """Enter the kernels into the table.

    Args:
        table: Of the cpu platform.
        kernels: For this processor.
        memory: For weights that are packed.
        origin: Package and version.
    """
    plain = references()
    ops = _NormOps(kernels, plain)
    table.override("rms_norm", ops.rms_norm, origin=origin)
    table.override("add_rms_norm", ops.add_rms_norm, origin=origin)
    gates = {name: _Gate(kernels, number, plain[name]) for name, number in GATES.items()}
    for name, gate in gates.items():
        table.override(name, gate, origin=origin)
    table.override("layer_norm", ops.layer_norm, origin=origin)
    table.override("add", partial(_add, kernels, plain["add"]), origin=origin)
    for kind, name in enumerate(_POINTWISE):
        table.override(name, _Pointwise(kernels, kind, plain[name]), origin=origin)
    table.override("embedding", partial(_embedding, kernels, plain["embedding"]), origin=origin)
    for bits, packed in ((8, Int8Panels), (4, Int4Panels)):
        table.override(f"int{bits}_weight", partial(packed, kernels, memory), origin=origin)
        table.override(f"int{bits}_linear", _integer_linear, origin=origin)
    table.override("gated_linear", partial(_gated_linear, gates), origin=origin)


class _NormOps:
    def __init__(self, kernels: Kernels, plain: dict[str, Any]) -> None:
        self._run = kernels.rms_norm
        self._run_layer_norm = kernels.layer_norm
        self._plain = plain

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """See ``Ops``."""
        if x.dtype is not torch.bfloat16 or weight.dtype not in _NORM_WEIGHTS:
            plain: Tensor = self._plain["rms_norm"](x, weight, eps)
            return plain
        x = x.contiguous()
        out = torch.empty_like(x)
        self._norm(x, None, weight, eps, out, None)
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """See ``Ops``."""
        if x.dtype is not torch.bfloat16 or weight.dtype not in _NORM_WEIGHTS:
            plain: tuple[Tensor, Tensor] = self._plain["add_rms_norm"](x, residual, weight, eps)
            return plain
        x, residual = x.contiguous(), residual.contiguous()
        out, total = torch.empty_like(x), torch.empty_like(x)
        self._norm(x, residual.data_ptr(), weight, eps, out, total.data_ptr())
        return out, total

    def layer_norm(self, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        """See ``Ops``."""
        alike = bias is None or bias.dtype is weight.dtype
        if x.dtype is not torch.bfloat16 or weight.dtype not in _NORM_WEIGHTS or not alike:
            plain: Tensor = self._plain["layer_norm"](x, weight, bias, eps)
            return plain
        x = x.contiguous()
        size = x.shape[-1]
        wide = weight.dtype is torch.float32
        at_bias = None if bias is None else bias.data_ptr()
        out = torch.empty_like(x)
        rows = x.numel() // size
        self._run_layer_norm(
            x.data_ptr(), rows, size, weight.data_ptr(), at_bias, wide, eps, out.data_ptr()
        )
        return out

    def _norm(
        self,
        x: Tensor,
        residual: int | None,
        weight: Tensor,
        eps: float,
        out: Tensor,
        total: int | None,
    ) -> None:
        size = x.shape[-1]
        wide = weight.dtype is torch.float32
        rows = x.numel() // size
        self._run(
            x.data_ptr(), residual, rows, size, weight.data_ptr(), wide, eps, out.data_ptr(), total
        )


class _Gate:
    """An activation of the first half of the last axis, times the second half."""

    def __init__(self, kernels: Kernels, number: int, plain: Any) -> None:
        self._run = kernels.gate
        self._number = number
        self._plain = plain

    def __call__(self, gate_up: Tensor) -> Tensor:
        if gate_up.dtype is not torch.bfloat16:
            plain: Tensor = self._plain(gate_up)
            return plain
        x = gate_up.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty(*x.shape[:-1], width)
        self._run(x.data_ptr(), x.numel() // (2 * width), width, self._number, out.data_ptr())
        return out


class _Pointwise:
    """A function of each number, which may have a parameter."""

    def __init__(self, kernels: Kernels, kind: int, plain: Any) -> None:
        self._run = kernels.pointwise
        self._kind = kind
        self._plain = plain

    def __call__(self, x: Tensor, *parameter: float) -> Tensor:
        if x.dtype is not torch.bfloat16:
            plain: Tensor = self._plain(x, *parameter)
            return plain
        x = x.contiguous()
        out = torch.empty_like(x)
        number = float(parameter[0]) if parameter else 0.0
        self._run(x.data_ptr(), x.numel(), self._kind, number, out.data_ptr())
        return out


def _add(kernels: Kernels, plain: Any, x: Tensor, y: Tensor) -> Tensor:
    """See ``Ops``."""
    if x.dtype is not torch.bfloat16 or y.dtype is not torch.bfloat16 or x.shape != y.shape:
        other: Tensor = plain(x, y)
        return other
    x, y = x.contiguous(), y.contiguous()
    out = torch.empty_like(x)
    kernels.add(x.data_ptr(), y.data_ptr(), x.numel(), out.data_ptr())
    return out


def _integer_linear(x: Tensor, weight: IntegerPanels) -> Tensor:
    """See ``Ops.int8_linear`` and ``int4_linear``."""
    return weight(x)


def _gated_linear(
    gates: dict[str, _Gate], x: Tensor, weight: BoundLinear, activation: str
) -> Tensor:
    """See ``Ops``: in one pass where the layer can."""
    layer: Any = weight
    if isinstance(weight, QuantizedLinear) and type(weight.scheme) in _BOUND_ALONE:
        layer = weight.bound
    if isinstance(layer, PanelLayer):
        return layer.gated(x, activation)
    return gates[activation](weight(x))


def _embedding(kernels: Kernels, plain: Any, ids_T: Tensor, table_VD: Tensor) -> Tensor:
    """See ``Ops``."""
    dense = ids_T.is_contiguous() and table_VD.is_contiguous()
    if not dense or ids_T.dtype is not torch.int64:
        other: Tensor = plain(ids_T, table_VD)
        return other
    num_rows, width = table_VD.shape
    out = table_VD.new_empty(*ids_T.shape, width)
    row_bytes = width * table_VD.element_size()
    kernels.embedding(
        ids_T.data_ptr(), ids_T.numel(), table_VD.data_ptr(), num_rows, row_bytes, out.data_ptr()
    )
    return out
