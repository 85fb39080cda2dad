"""Where drafts stand among the places of a step, and how many of them are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch
from dovetail.core.types import BoolArray, IntArray
from dovetail.platforms.torch.sampling.rows import on_device

__all__ = ["Accepted", "Places"]


class Accepted(NamedTuple):
    """The tokens of each of S rows; see ``core.batch.StepOutput``."""

    token_ids: Tensor
    """(S, W) int64"""
    num_tokens: Tensor
    """(S,) int64"""
    finite: Tensor
    """(S,) bool"""


@dataclass(frozen=True, kw_only=True)
class Places:
    """The G places of S rows: a row's last known token, then its drafts."""

    counts: IntArray
    """(S,) places of each row."""
    starts: IntArray
    """(S,) the first of them among the G."""
    index_SW: Tensor
    """(S, W) int64: each row's places; its last one again where it has fewer than W."""
    drafts_SW: Tensor
    """(S, W) int64: the token that is drafted to follow each place; -1 where none is."""

    @classmethod
    def of(cls, batch: Batch, num_drafts: IntArray, device: torch.device) -> Places:
        """The places of a batch, whose drafts must be known on the host."""
        counts = num_drafts + 1
        starts = np.cumsum(counts) - counts
        within = np.arange(int(counts.max(initial=1)))
        index = starts[:, None] + np.minimum(within, num_drafts[:, None])
        after = np.minimum(batch.logit_index[index] + 1, batch.num_tokens - 1)
        drafts = np.where(within < num_drafts[:, None], batch.token_ids[after], -1)
        return cls(
            counts=counts,
            starts=starts,
            index_SW=on_device(index.astype(np.int64), device),
            drafts_SW=on_device(drafts.astype(np.int64), device),
        )

    def right(self, tokens_G: Tensor, number: int) -> BoolArray:
        """(S,) whether the row has a draft behind its place ``number``, and it is right.

        Waits for the device.
        """
        if number >= self.index_SW.shape[1]:
            return np.zeros(len(self.counts), np.bool_)
        chosen = tokens_G[self.index_SW[:, number]]
        right: BoolArray = (chosen == self.drafts_SW[:, number]).cpu().numpy()
        return right

    def rows_of(self, by_place: Mapping[int, str]) -> Mapping[int, str]:
        """What is said of places, by index into S."""
        found = np.searchsorted(self.starts, [*by_place], side="right") - 1
        return dict(zip(found.tolist(), by_place.values(), strict=True))

    def accept(self, tokens_G: Tensor, finite_G: Tensor) -> Accepted:
        """The beginning of each row's tokens in which all drafts are right, and one more."""
        tokens = tokens_G[self.index_SW]
        right = (tokens == self.drafts_SW).long().cumprod(1)
        count = right.sum(1) + 1
        inside = torch.arange(tokens.shape[1], device=tokens.device) < count[:, None]
        return Accepted(tokens, count, (finite_G[self.index_SW] | ~inside).all(1))
