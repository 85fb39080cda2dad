"""How the likeliest tokens of a row are found without a sort.

"Likelier" is a total order everywhere: the larger logit first, and of equal logits the lower token
id. The k likeliest tokens lie in the k blocks with the likeliest maxima, so one pass for the maxima
and a selection among few tokens are enough, and exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dovetail.platforms.torch.sampling.rows import BLOCK, Rows, per_block

__all__ = ["greedy", "likeliest", "order_keys", "ordered", "values_of"]

_GREEDY_BLOCK = 256
_LOW = 0xFFFFFFFF


def greedy(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest token of each row, in one pass over the logits.

    Returns:
        Ids (N,) int64, of equal logits the lowest; and their logits (N,) float32: NaN if the row
        holds NaN anywhere, otherwise infinite only if the row has no finite maximum.
    """
    maxima = per_block(logits_NV, _GREEDY_BLOCK, torch.amax)
    block = maxima.float().argmax(-1, keepdim=True)
    ids = block * _GREEDY_BLOCK + torch.arange(_GREEDY_BLOCK, device=logits_NV.device)
    ids.clamp_(max=logits_NV.shape[1] - 1)
    values = logits_NV.gather(1, ids).float()
    offset = values.argmax(-1, keepdim=True)
    return ids.gather(1, offset)[:, 0], values.gather(1, offset)[:, 0]


def likeliest(rows: Rows, maxima_NB: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each row, likeliest first.

    Args:
        rows: n rows.
        maxima_NB: Their ``maxima()``.
        k: At least 1; the vocabulary size serves if that is less.

    Returns:
        Logits (n, k) float32 and ids (n, k) int64.
    """
    num_blocks = rows.vocab_size // BLOCK
    numbers = torch.arange(num_blocks, device=rows.device).expand(len(rows), -1)
    if num_blocks > k:
        keys = order_keys(maxima_NB[:, :num_blocks], numbers)
        numbers = _ids_of(keys.topk(k, sorted=False).values)
    keys = order_keys(*rows.take_blocks(numbers))
    best = keys.topk(min(k, rows.vocab_size)).values
    return values_of(best >> 32), _ids_of(best)


def order_keys(values: Tensor, ids: Tensor) -> Tensor:
    """int64 keys, distinct and larger for what is likelier: the value above, the id below."""
    return (ordered(values).long() << 32) | (ids ^ _LOW)


def _ids_of(keys: Tensor) -> Tensor:
    return (keys & _LOW) ^ _LOW


def ordered(values: Tensor) -> Tensor:
    """int32 with the order of the float32 values; -0 becomes +0. NaN is beyond infinity."""
    bits = (values + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def values_of(ordered: Tensor) -> Tensor:
    """The float32 values of which ``ordered`` (any integer dtype) is the order."""
    bits = ordered.int()
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
