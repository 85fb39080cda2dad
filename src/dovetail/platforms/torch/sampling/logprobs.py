"""Log-probabilities of a chosen token and of the likeliest ones, for sampled and prompt tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dovetail.platforms.torch.sampling.order import likeliest
from dovetail.platforms.torch.sampling.rows import BLOCK, Rows, per_block
from dovetail.platforms.torch.sampling.weights import total_weights, unit

__all__ = ["LogprobTensors", "logprobs"]


class LogprobTensors(NamedTuple):
    """N positions, on the device; see ``core.batch.LogprobArrays``."""

    token_ids: Tensor
    """(N, 1 + k) int64: the chosen token, then the likeliest; of equal ones the lower id."""
    logprobs: Tensor
    """(N, 1 + k) float32."""
    ranks: Tensor
    """(N,) int64: 1 + the number of tokens that are strictly likelier than the chosen one."""


def logprobs(logits_NV: Tensor, chosen_N: Tensor, k: int) -> LogprobTensors:
    """Log-softmax of float32 logits, for a few tokens of each row; the same bits in any batch.

    Args:
        logits_NV: Any float dtype, before anything was done to them.
        chosen_N: int64.
        k: How many of the likeliest; at most the vocabulary size serves.
    """
    rows = Rows(logits_NV)
    ids = chosen_N[:, None]
    maxima = rows.maxima()
    peak = maxima.amax(-1, keepdim=True)
    values = rows.take(ids)
    ranks = _ranks(rows, values)
    if k:
        best, best_ids = likeliest(rows, maxima, k)
        values, ids = torch.cat((values, best), 1), torch.cat((ids, best_ids), 1)
    total = total_weights(rows, peak, torch.ones_like(peak)) / unit(rows.vocab_size)
    return LogprobTensors(ids, ((values - peak).double() - total.log()).float(), ranks)


def _ranks(rows: Rows, value_N1: Tensor) -> Tensor:
    counts = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    for part, x in rows.chunks():
        above = torch.gt(x, value_N1[part], out=torch.empty_like(x))
        counts[part] = per_block(above, BLOCK, torch.sum).sum(-1)
    return counts + 1
