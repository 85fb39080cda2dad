"""One token per row: the likeliest, a free draw, or a draw within min_p, top_k and top_p."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import SamplingBatch
from dovetail.core.types import BoolArray
from dovetail.platforms.torch.sampling.limited import Limited
from dovetail.platforms.torch.sampling.order import greedy
from dovetail.platforms.torch.sampling.rows import Rows, Which
from dovetail.platforms.torch.sampling.weights import Controls, draw_from_all

__all__ = ["GREEDY_BELOW", "Choose", "choose"]

GREEDY_BELOW = 1e-5
"""Temperatures below this are greedy, as in ``SamplingParams.is_greedy``."""


class Choose(Protocol):
    """Chooses a token for each of n rows. Never changes their logits."""

    def __call__(self, rows: Rows, which: Which, sampling: SamplingBatch) -> tuple[Tensor, Tensor]:
        """The likeliest token where the temperature is below 1e-5, else a draw.

        Args:
            rows: Logits of any float dtype.
            which: (n,) which rows of the batch they are.
            sampling: Of the batch.

        Returns:
            As ``ChooseFixed``.
        """
        ...


def choose(rows: Rows, which: Which, sampling: SamplingBatch) -> tuple[Tensor, Tensor]:
    """A ``Choose``, each row in the way that costs least."""
    tokens, peak = _choose(rows, which, sampling)
    finite = torch.isfinite(peak)
    return torch.where(finite, tokens, 0), finite


def _choose(rows: Rows, which: Which, sampling: SamplingBatch) -> tuple[Tensor, Tensor]:
    """Tokens (n,) and the largest logits (n,), NaN where a row holds NaN."""
    if sampling.all_greedy:
        return greedy(rows.tensor())
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
            tokens[at], peak[at] = greedy(part.tensor())
        elif kind is limited:
            limits = Limited.of(part, mine, sampling)
            tokens[at], peak[at] = limits.draw(), limits.peak[:, 0]
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
