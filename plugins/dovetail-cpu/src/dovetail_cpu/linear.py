"""Linear layers whose weights are repacked once: for the compiled kernels, or by oneDNN."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.platforms.torch.ops import references
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.memory import HugePages

__all__ = [
    "GATES",
    "PackedLinear",
    "PanelLayer",
    "PanelLinear",
    "can_gate",
    "can_pack",
    "padded",
    "padded_bias",
    "panels",
]

_ROWS_HINT = 64
"""The number of input rows that the layout is chosen for; it serves 1 to some thousands well."""
_EXACT_ROWS = 16
_STEPS_PER_DOUBLING = 8
_PANEL, _LANES = 32, 16
"""Columns of a panel, and of a vector (native/linear.h)."""
GATES = {"silu_and_mul": 1, "gelu_tanh_and_mul": 2}
"""The gates that the kernels know, by the op's name (native/linear.h)."""


def can_pack(weight: Tensor) -> bool:
    """Whether this build of torch has oneDNN's kernels for the weight's dtype on this machine."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if weight.dtype == torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return weight.dtype == torch.float32 and _has_vectors()


def _has_vectors() -> bool:
    """Whether oneDNN compiles its kernels for this processor, as it does on x86 with AVX."""
    return torch.backends.cpu.get_cpu_capability().startswith("AVX")


def _padded(num_rows: int) -> int:
    """The number of rows to compute: at most an eighth more.

    oneDNN keeps a kernel of half a megabyte or more for every number of rows that it has seen, and
    a server sees them all.
    """
    if num_rows <= _EXACT_ROWS:
        return num_rows
    step = (1 << (num_rows - 1).bit_length()) // (2 * _STEPS_PER_DOUBLING)
    return -(-num_rows // step) * step


class PackedLinear:
    """``x @ W.T + b`` over a copy of W that oneDNN has repacked; the original may be dropped.

    Args:
        weight: (out, in), of a dtype that ``can_pack`` admits.
        bias: (out,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS_HINT)
        self.bias = None if bias is None else bias.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        rows = x.reshape(-1, x.shape[-1])
        num_rows = len(rows)
        missing = _padded(num_rows) - num_rows
        if missing:
            rows = functional.pad(rows, (0, 0, 0, missing))
        out: Tensor = torch.ops.mkldnn._linear_pointwise(
            rows, self.weight, self.bias, "none", [], ""
        )
        return out[:num_rows].view(*x.shape[:-1], -1)


def panels(
    kernels: Kernels, memory: HugePages, pieces: Sequence[Tensor], sums: Tensor | None = None
) -> Tensor:
    """Words (out, n) int32 repacked to panels (out / 32, n, 32), zeros behind the last column.

    Args:
        kernels: For this processor.
        memory: For the panels.
        pieces: Dense rows of words, those of one piece below those of the one before.
        sums: (columns of all panels,) int32, set to the sums of the columns' signed bytes.
    """
    addresses = torch.tensor([piece.data_ptr() for piece in pieces])
    counts = torch.tensor([len(piece) for piece in pieces])
    depth = pieces[0].shape[1]
    packed = memory.empty((-(-int(counts.sum()) // _PANEL), depth, _PANEL), torch.int32)
    where = (addresses.data_ptr(), counts.data_ptr(), len(pieces))
    kernels.pack(*where, depth, packed.data_ptr(), None if sums is None else sums.data_ptr())
    return packed


def padded(row: Tensor, value: float = 0) -> Tensor:
    """A row with an entry for each column of the panels, which the kernels read whole."""
    missing = -len(row) % _PANEL
    return functional.pad(row, (0, missing), value=value).contiguous()


def padded_bias(bias: Tensor | None) -> Tensor | None:
    """As the kernels read it: float32, with an entry for each column of the panels."""
    return None if bias is None else padded(bias.float())


def can_gate(num_columns: int) -> bool:
    """Whether the kernels can gate a layer of so many outputs."""
    return num_columns % (2 * _LANES) == 0


class PanelLayer(ABC):
    """A layer over W in panels, whose kernel may gate its result on the way."""

    kind: ClassVar[str]
    """Of its panels: what ``arrays`` of another kind mean is another thing."""
    num_columns: int
    """Outputs."""
    num_inputs: int

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return self._product(x, self.num_columns, 0)

    def gated(self, x: Tensor, activation: str) -> Tensor:
        """The gate of ``GATES`` over the result: (..., in) to (..., out / 2)."""
        if not can_gate(self.num_columns):
            gated: Tensor = references()[activation](self(x))
            return gated
        return self._product(x, self.num_columns // 2, GATES[activation])

    def arrays(self) -> tuple[list[Tensor], Tensor | None]:
        """What the layer is made of, packed: its arrays, and its bias or None."""
        return list(self._arrays), self._bias

    @classmethod
    def restored(
        cls,
        kernels: Kernels,
        size: tuple[int, int],
        arrays: Sequence[Tensor],
        bias: Tensor | None,
    ) -> Self:
        """The same layer from its ``arrays``, for which nothing is packed or copied.

        Args:
            kernels: For this processor.
            size: Outputs and inputs.
            arrays: Never written to.
            bias: With an entry for each column of the panels, or None.
        """
        layer = cls.__new__(cls)
        layer._hold(kernels, size, arrays, bias)
        return layer

    def _hold(
        self,
        kernels: Kernels,
        size: tuple[int, int],
        arrays: Sequence[Tensor],
        bias: Tensor | None,
    ) -> None:
        self._kernels = kernels
        self.num_columns, self.num_inputs = size
        self._arrays = tuple(arrays)
        self._addresses = [array.data_ptr() for array in arrays]
        self._bias = bias
        self._bias_address = None if bias is None else bias.data_ptr()

    @abstractmethod
    def _product(self, x: Tensor, width: int, gate: int) -> Tensor:
        """(..., width): all outputs, or half as many that are gated."""


class PanelLinear(PanelLayer):
    """``x @ W.T + b`` in bfloat16 by the compiled kernels, over W in panels.

    Args:
        kernels: For this processor.
        memory: For the panels.
        weight: (out, in) bfloat16, with an even number of inputs, or pieces of it that lie one
            below the other. May be dropped.
        bias: (out,) or None.
    """

    kind = "bf16"

    def __init__(
        self,
        kernels: Kernels,
        memory: HugePages,
        weight: Tensor | Sequence[Tensor],
        bias: Tensor | None,
    ) -> None:
        pieces = [weight] if isinstance(weight, Tensor) else weight
        words = [piece.contiguous().view(torch.int32) for piece in pieces]
        size = sum(map(len, pieces)), pieces[0].shape[1]
        self._hold(kernels, size, [panels(kernels, memory, words)], padded_bias(bias))

    def _product(self, x: Tensor, width: int, gate: int) -> Tensor:
        if x.dtype is not torch.bfloat16 or x.shape[-1] != self.num_inputs:
            raise ValueError(
                f"a layer of {self.num_inputs} inputs in bfloat16 was given {tuple(x.shape)} in"
                f" {x.dtype}"
            )
        rows = x if x.dim() == 2 else x.reshape(-1, self.num_inputs)
        if rows.stride(1) != 1:
            rows = rows.contiguous()
        num_rows = len(rows)
        out = x.new_empty(num_rows, width)
        self._kernels.bf16_linear(
            rows.data_ptr(),
            rows.stride(0),
            num_rows,
            self.num_inputs,
            self._addresses[0],
            self.num_columns,
            self._bias_address,
            gate,
            out.data_ptr(),
            width,
        )
        return out if x.dim() == 2 else out.view(*x.shape[:-1], width)
