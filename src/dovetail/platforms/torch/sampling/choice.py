"""One token per row: the likeliest, a free draw, or a draw within min_p, top_k and top_p."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import SamplingBatch
from dovetail.core.types import BoolArray
from dovetail.platforms.torch.sampling.boundary import Boundary
from dovetail.platforms.torch.sampling.limited import Limited
from dovetail.platforms.torch.sampling.order import greedy
from dovetail.platforms.torch.sampling.rows import Rows, Which
from dovetail.platforms.torch.sampling.weights import Controls, draw_from_all

__all__ = ["GREEDY_BELOW", "Likeliest", "Restrict", "choose"]

Restrict = Callable[[Tensor, Controls], Boundary]
"""From logits (n, V) of any float dtype to the last token kept in each row, as ``by_sort`` does."""

Likeliest = Callable[[Tensor], tuple[Tensor, Tensor]]
"""From logits (n, V) to the likeliest tokens, as ``greedy`` finds them."""

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in ``SamplingParams.is_greedy``."""


def choose(
    rows: Rows,
    which: Which,
    sampling: SamplingBatch,
    restrict: Restrict | None = None,
    likeliest: Likeliest = greedy,
) -> tuple[Tensor, Tensor]:
    """Choose for n rows, which are rows ``which`` of the batch.

    Returns:
        Tokens (n,) int64 and the largest logits (n,) float32, NaN where a row holds NaN.
    """
    if sampling.all_greedy:
        return likeliest(rows.tensor())
    cold = sampling.temperature[which] < GREEDY_BELOW
    limited = ~cold & _limits(which, sampling, rows.vocab_size)
    tokens = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
    peak = torch.empty(len(rows), device=rows.device)
    for kind in (cold, limited, ~cold & ~limited):
        places = np.flatnonzero(kind)
        if not len(places):
            continue
        part, mine, at = rows.subset(places), which[places], rows.places(places)
        if kind is cold:
            tokens[at], peak[at] = likeliest(part.tensor())
        elif kind is limited:
            tokens[at], peak[at] = _draw_limited(part, mine, sampling, restrict)
        else:
            tokens[at], peak[at] = _draw_freely(part, mine, sampling)
    return tokens, peak


def _limits(which: Which, sampling: SamplingBatch, vocab_size: int) -> BoolArray:
    return np.asarray(
        (sampling.top_k[which] < vocab_size)
        | (sampling.top_p[which] < 1)
        | (sampling.min_p[which] > 0)
    )


def _draw_freely(rows: Rows, which: Which, sampling: SamplingBatch) -> tuple[Tensor, Tensor]:
    peak = rows.maxima().amax(-1, keepdim=True)
    controls = Controls.of(sampling, which, rows.device)
    return draw_from_all(rows, peak, controls), peak[:, 0]


def _draw_limited(
    rows: Rows, which: Which, sampling: SamplingBatch, restrict: Restrict | None
) -> tuple[Tensor, Tensor]:
    if restrict is None:
        limited = Limited.of(rows, which, sampling)
        return limited.draw(), limited.peak[:, 0]
    peak = rows.maxima().amax(-1, keepdim=True)
    controls = Controls.of(sampling, which, rows.device)
    boundary = restrict(rows.tensor(), controls)
    return draw_from_all(rows, peak, controls, boundary), peak[:, 0]
