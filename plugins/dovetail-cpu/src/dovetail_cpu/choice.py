"""The choice of tokens by the compiled kernels."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import SamplingBatch
from dovetail.platforms.torch.sampling.rows import Rows, Which
from dovetail.platforms.torch.sampling.weights import Controls
from dovetail_cpu.kernels import Kernels

__all__ = ["choose_rows"]


def choose_rows(
    kernels: Kernels, rows: Rows, which: Which, sampling: SamplingBatch
) -> tuple[Tensor, Tensor]:
    """As ``sampling.choice.choose``, for logits on the host."""
    logits = rows.tensor()
    if logits.dtype not in (torch.bfloat16, torch.float32):
        logits = logits.float()
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    num_rows, vocab_size = logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64)
    finite = torch.empty(num_rows, dtype=torch.bool)
    controls = None
    if not sampling.all_greedy:
        controls = np.ascontiguousarray(Controls.pack(sampling)[:, which])
    kernels.choose(
        logits.data_ptr(),
        logits.dtype is torch.float32,
        logits.stride(0),
        num_rows,
        vocab_size,
        None if controls is None else controls.ctypes.data,
        tokens.data_ptr(),
        finite.data_ptr(),
    )
    return tokens, finite
