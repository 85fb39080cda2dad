"""Token masks: what a grammar forbids gets the logit minus infinity."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import TokenMasks
from dovetail.platforms.torch.sampling.rows import on_device

__all__ = ["masked"]


def masked(logits_GV: Tensor, masks: TokenMasks, *, keep: bool) -> Tensor:
    """The logits with everything forbidden at minus infinity; what is allowed keeps its value.

    Minus infinity is added, so that a logit which is not a number, or infinite, still shows, also
    where it is forbidden.

    Args:
        logits_GV: Any float dtype; changed in place unless it is to be kept.
        masks: Of some of the G rows.
        keep: Work on a copy.
    """
    if keep:
        logits_GV = logits_GV.clone()
    places = on_device(masks.places.astype(np.int64), logits_GV.device)
    limits = _limits(masks, logits_GV)
    if len(places) == len(logits_GV):
        return logits_GV.add_(limits)
    return logits_GV.index_add_(0, places, limits)


def _limits(masks: TokenMasks, logits_GV: Tensor) -> Tensor:
    """(M, V) as the logits: 0 or minus infinity, eight tokens of the vocabulary for each byte."""
    octets = on_device(masks.bits.astype("<i4", copy=False).view(np.uint8), logits_GV.device)
    table = _table(logits_GV.device, logits_GV.dtype)
    limits = table.index_select(0, octets.flatten().int())
    return limits.view(len(octets), -1)[:, : logits_GV.shape[1]]


@cache
def _table(device: torch.device, dtype: torch.dtype) -> Tensor:
    """(256, 8): what each byte allows, lowest bit first."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
    return on_device(np.where(bits, 0.0, -np.inf).astype(np.float32), device).to(dtype)
