"""What the emulations share."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["HALVES", "attend", "gathered", "need"]

HALVES = (torch.float16, torch.bfloat16)


def need(holds: bool, what: str) -> None:
    """Raise as the libraries do."""
    if not holds:
        raise RuntimeError(what)


def attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool, left: int, cap: float
) -> Tensor:
    """(n, H, E): the last n of L positions over (L, K, E)."""
    if not len(q):
        return q.clone()
    group = q.shape[1] // k.shape[1]
    k, v = (side.float().repeat_interleave(group, 1) for side in (k, v))
    scores = torch.einsum("nhe,lhe->hnl", q.float(), k) * scale
    if cap > 0:
        scores = cap * torch.tanh(scores / cap)
    query = torch.arange(len(k) - len(q), len(k))[:, None]
    key = torch.arange(len(k))
    hidden = (key > query) if causal else torch.zeros(len(q), len(k), dtype=torch.bool)
    if left >= 0:
        hidden = hidden | (key < query - left)
    weights = scores.masked_fill(hidden, -math.inf).softmax(-1).nan_to_num(0)
    return torch.einsum("hnl,lhe->nhe", weights, v).to(q.dtype)


def gathered(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    """(length, K, E)"""
    return cache[pages.long()].flatten(0, 1)[:length]
