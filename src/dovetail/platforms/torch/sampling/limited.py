"""Draws from what min_p, top_k and top_p leave, in the way that costs least.

Looking at k likeliest tokens costs time in proportion to k, and 64 are enough for most rows of a
language model; a search of the whole vocabulary costs what looking at 3000 does. Where looking at a
result is free (on the host) 64, 512 and a search are tried in this order, each on the rows that the
one before did not cover. Elsewhere asking would stop the device's queue, so a row's parameters
decide: few tokens for a small top_k, the search for the rest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import SamplingBatch
from dovetail.core.types import IntArray
from dovetail.platforms.torch.sampling.restriction import Few, by_search, few
from dovetail.platforms.torch.sampling.rows import Rows, Which
from dovetail.platforms.torch.sampling.weights import (
    Controls,
    draw_from_all,
    draw_from_few,
    total_weights,
)

__all__ = ["Limited"]

_FEW = (64, 512)
"""How many likeliest tokens are looked at where no top_k says: at first, and once more."""
_MOST_FEW = 1024
"""The largest top_k for which looking at so many tokens costs less than a search."""


@dataclass(frozen=True, kw_only=True)
class Limited:
    """n rows to draw from, and what is known of them."""

    rows: Rows
    maxima: Tensor
    """(n, B) float32: ``Rows.maxima()``."""
    peak: Tensor
    """(n, 1) float32: the largest logit."""
    totals: Tensor
    """(n, 1) float64, as for ``restriction.few``."""
    controls: Controls
    top_k: IntArray
    """The controls' top_k, on the host."""

    @classmethod
    def of(cls, rows: Rows, which: Which, sampling: SamplingBatch) -> Limited:
        """Rows that are ``which`` of the batch. Computes totals where the device is the host."""
        maxima, controls = rows.maxima(), Controls.of(sampling, which, rows.device)
        peak = maxima.amax(-1, keepdim=True)
        totals = torch.full_like(peak, torch.inf, dtype=torch.float64)
        top_k, vocab = sampling.top_k[which], rows.vocab_size
        whole = np.flatnonzero((top_k >= vocab) & (sampling.min_p[which] == 0))
        if len(whole) and rows.on_host:
            at = rows.places(whole)
            heat = controls.temperature[at]
            totals[at] = total_weights(rows.subset(whole), peak[at], heat)
        return cls(
            rows=rows,
            maxima=maxima,
            peak=peak,
            totals=totals,
            controls=controls,
            top_k=top_k,
        )

    def part(self, places: Which) -> Limited:
        """Some of the rows."""
        if len(places) == len(self.rows):
            return self
        at = self.rows.places(places)
        return Limited(
            rows=self.rows.subset(places),
            maxima=self.maxima[at],
            peak=self.peak[at],
            totals=self.totals[at],
            controls=self.controls.take(at),
            top_k=self.top_k[places],
        )

    def draw(self) -> Tensor:
        """(n,) token ids."""
        return self._draw_asking() if self.rows.on_host else self._draw_unasked()

    def _draw_asking(self) -> Tensor:
        tokens = torch.empty(len(self.rows), dtype=torch.int64)
        left, first = np.arange(len(tokens)), max(self._largest_few(), _FEW[0])
        for k in (first, *(k for k in _FEW if k > first)):
            part = self.part(left)
            found = part.look(k)
            tokens[left] = draw_from_few(found.ids, found.weights, part.controls.uniform)
            left = left[~found.covered.numpy()]
            if not len(left):
                return tokens
        tokens[left] = self.part(left).search()
        return tokens

    def _draw_unasked(self) -> Tensor:
        small = self.top_k <= _MOST_FEW
        tokens = torch.empty(len(self.rows), dtype=torch.int64, device=self.rows.device)
        if small.any():
            part = self.part(np.flatnonzero(small))
            found = part.look(self._largest_few())
            drawn = draw_from_few(found.ids, found.weights, part.controls.uniform)
            tokens[self.rows.places(np.flatnonzero(small))] = drawn
        if not small.all():
            places = np.flatnonzero(~small)
            tokens[self.rows.places(places)] = self.part(places).search()
        return tokens

    def _largest_few(self) -> int:
        return int(self.top_k[self.top_k <= _MOST_FEW].max(initial=0))

    def look(self, k: int) -> Few:
        """At the k likeliest tokens."""
        return few(self.rows, self.maxima, self.peak, self.totals, self.controls, k)

    def search(self) -> Tensor:
        """(n,) ids, by a search of the whole vocabulary for each row's boundary."""
        counts = bool((self.top_k < self.rows.vocab_size).any())
        boundary = by_search(self.rows, self.peak, self.controls, counts=counts)
        return draw_from_all(self.rows, self.peak, self.controls, boundary)
