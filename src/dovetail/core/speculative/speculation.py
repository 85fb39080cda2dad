"""Drafts for the rows of a step: how many, from where, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dovetail.core.config.speculative import SpeculativeConfig
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.speculative.base import Proposer
from dovetail.core.speculative.benefit import Benefit
from dovetail.core.speculative.ngram import NgramProposer
from dovetail.core.speculative.suffix import SuffixProposer
from dovetail.core.types import IntArray

__all__ = ["Speculation", "SpeculationStats"]


@dataclass(kw_only=True)
class SpeculationStats:
    """Counters since start."""

    num_drafts: int = 0
    """Rows of steps that had drafts."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


class Speculation:
    """Guesses the next tokens of rows, and learns from what was accepted.

    Drafts are written to the row's tokens, behind those that are known. Without a proposer they
    come from the runner's draft model, with the result of the step before.

    Args:
        config: Everything decided.
        table: The rows.
    """

    def __init__(self, config: SpeculativeConfig, table: RowTable) -> None:
        self.config = config
        self.stats = SpeculationStats()
        self._table = table
        self._proposer = _proposer(config)
        self._benefit = Benefit() if config.adaptive else None
        num_rows = len(table.num_known)
        self._limit = np.full(num_rows, config.num_speculative_tokens, np.int32)
        """The most drafts for each row: more after all were accepted, fewer after a miss."""
        self._limit_epoch = np.full(num_rows, -1, np.int64)
        self._from_model = np.full((num_rows, config.num_speculative_tokens), -1, np.int32)
        self._model_epoch = np.full(num_rows, -1, np.int64)

    @property
    def from_model(self) -> bool:
        """Whether the runner's draft model guesses."""
        return self._proposer is None

    def worthwhile(self, num_rows: int) -> bool:
        """Whether a step in which so many rows decode is to have drafts."""
        return self._benefit is None or self._benefit.worthwhile(num_rows)

    def measured(self, num_rows: int, with_drafts: bool, tokens: int, seconds: float) -> None:
        """What a step gave in which nothing but ``num_rows`` decoding rows was computed."""
        if self._benefit is not None:
            self._benefit.measured(num_rows, with_drafts, tokens, seconds)

    def propose(self, rows: IntArray, room: int) -> IntArray:
        """Write drafts for rows all of whose tokens are known; returns how many each, (R,).

        Args:
            rows: (R,) rows that decode.
            room: The most drafts of all rows together.
        """
        table = self._table
        known = table.num_known[rows]
        most = np.minimum(self._limits(rows), table.total[rows] - known - 1)
        counts = np.zeros(len(rows), np.int32)
        for i in np.flatnonzero((most > 0) & table.may_draft[rows]).tolist():
            if room <= 0:
                break
            row = int(rows[i])
            drafts = self._drafts(row, int(known[i]), min(int(most[i]), room))
            counts[i] = len(drafts)
            room -= len(drafts)
            table.tokens[row, known[i] : known[i] + len(drafts)] = drafts
        return counts

    def _drafts(self, row: int, known: int, count: int) -> list[int]:
        table, epoch = self._table, int(self._table.epoch[row])
        if self._proposer is None:
            if self._model_epoch[row] != epoch:
                return []
            drafts = self._from_model[row, :count].tolist()
        else:
            salt = table.at(row).request.cache_salt
            drafts = self._proposer.propose(row, epoch, salt, table.tokens[row, :known], count)
        wrong = (i for i, t in enumerate(drafts) if not 0 <= t < table.vocab_size)
        return drafts[: next(wrong, len(drafts))]

    def _limits(self, rows: IntArray) -> IntArray:
        stale = rows[self._limit_epoch[rows] != self._table.epoch[rows]]
        self._limit[stale] = self.config.num_speculative_tokens
        self._limit_epoch[stale] = self._table.epoch[stale]
        return self._limit[rows]

    def wanted(self, ends: IntArray, rows: IntArray) -> IntArray:
        """(S,) drafts that the draft model is to make, so that none lies behind a row's end.

        Args:
            ends: (S,) tokens of each row once the step is done, all drafts accepted.
            rows: (S,) the rows.
        """
        room = self._table.total[rows] - ends - 2
        return np.clip(room, 0, self.config.num_speculative_tokens).astype(np.int32)

    def take(self, rows: IntArray, drafts: IntArray | None) -> None:
        """Keep what the draft model proposes for each row, (n, k), for the next step."""
        if drafts is None:
            self._model_epoch[rows] = -1
            return
        self._from_model[rows] = -1
        self._from_model[rows, : drafts.shape[1]] = drafts
        self._model_epoch[rows] = self._table.epoch[rows]

    def checked(self, rows: IntArray, num_drafts: IntArray, num_accepted: IntArray) -> None:
        """Learn what became of the drafts of rows: arrays of shape (n,)."""
        had = num_drafts > 0
        rows, num_drafts, num_accepted = rows[had], num_drafts[had], num_accepted[had]
        self.stats.num_drafts += len(rows)
        self.stats.num_draft_tokens += int(num_drafts.sum())
        self.stats.num_accepted_tokens += int(num_accepted.sum())
        limit = self._limit[rows]
        limit = np.where(num_accepted == num_drafts, limit + 2, np.maximum(num_accepted + 1, 1))
        self._limit[rows] = np.minimum(limit, self.config.num_speculative_tokens)


def _proposer(config: SpeculativeConfig) -> Proposer | None:
    if config.method == "ngram":
        return NgramProposer(config.shortest_match, config.longest_match)
    if config.method == "suffix":
        return SuffixProposer(
            longest=config.longest_match,
            drafts_per_match=config.drafts_per_match,
            least_share=config.min_token_prob,
            memory=config.memory_tokens,
        )
    return None
