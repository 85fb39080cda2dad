"""Linear layers whose weights are repacked once into oneDNN's own layout."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["PackedLinear", "can_pack"]

_ROWS_HINT = 64
"""The number of input rows that the layout is chosen for; it serves 1 to some thousands well."""
_EXACT_ROWS = 16
_STEPS_PER_DOUBLING = 8


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
    """``x @ W.T + b`` over a repacked copy of W; the original may be dropped.

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
