"""Drafts for the rows of a step: how many, from where, and what became of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.config.speculative import SpeculativeConfig
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.speculative.base import Proposer
from dovetail.core.speculative.benefit import Benefit
from dovetail.core.speculative.ngram import NgramProposer
from dovetail.core.speculative.suffix import SuffixProposer
from dovetail.core.structured.base import Grammars
from dovetail.core.types import BoolArray, IndexArray, IntArray

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
        grammars: Of the rows that have one: drafts that they refuse are not made.
    """

    def __init__(self, config: SpeculativeConfig, table: RowTable, grammars: Grammars) -> None:
        self.config = config
        self.stats = SpeculationStats()
        self._table = table
        self._grammars = grammars
        self._proposer = _proposer(config)
        self._benefit = Benefit() if config.adaptive else None
        num_rows = len(table.num_known)
        self._limit = np.full(num_rows, config.num_speculative_tokens, np.int32)
        """The most drafts for each row: more after all were accepted, fewer after a miss."""
        self._limit_epoch = np.full(num_rows, -1, np.int64)
        self._from_model = np.full((num_rows, config.num_speculative_tokens), -1, np.int32)
        self._model_epoch = np.full(num_rows, -1, np.int64)
        self._drafting = False
        """The step that is being prepared is to have drafts."""
        self._timed: dict[int, bool] = {}
        """Steps under way that only decode, and whether they were to have drafts."""

    def begin(self, num_rows: int) -> bool:
        """Whether a step in which so many rows decode is to have drafts."""
        self._drafting = num_rows > 0 and (
            self._benefit is None or self._benefit.worthwhile(num_rows)
        )
        return self._drafting

    def propose(self, rows: IndexArray, decodes: BoolArray, room: int) -> IntArray:
        """Write drafts behind the tokens of rows that decode; returns how many each, (R,).

        Args:
            rows: (R,)
            decodes: (R,) whether the row computes one token in this step.
            room: The most drafts of all rows together.
        """
        table = self._table
        known = table.num_known[rows]
        most = np.minimum(self._limits(rows), table.total[rows] - known - 1)
        may = decodes & table.may_draft[rows] & (table.num_tokens[rows] == known)
        counts = np.zeros(len(rows), np.int32)
        for i in np.flatnonzero(may & (most > 0)).tolist():
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
            drafts: list[int] = self._from_model[row, :count].tolist()
        else:
            salt = table.at(row).request.cache_salt
            drafts = self._proposer.propose(row, epoch, salt, table.tokens[row, :known], count)
        wrong = (i for i, t in enumerate(drafts) if not 0 <= t < table.vocab_size)
        drafts = drafts[: next(wrong, len(drafts))]
        if drafts and table.has_grammar[row]:
            drafts = drafts[: self._grammars.valid_drafts(int(table.request_id[row]), drafts)]
        return drafts

    def _limits(self, rows: IndexArray) -> IntArray:
        stale = rows[self._limit_epoch[rows] != self._table.epoch[rows]]
        self._limit[stale] = self.config.num_speculative_tokens
        self._limit_epoch[stale] = self._table.epoch[stale]
        return self._limit[rows]

    def ahead(self, rows: IndexArray, ends: IntArray, drafts: IntArray) -> IntArray | None:
        """(R,) drafts that the draft model is to make after the step; None without one.

        None of them lies behind the end of its row.

        Args:
            rows: (R,)
            ends: (R,) tokens that are computed once the step is done.
            drafts: (R,) how many of these are drafts.
        """
        if self._proposer is not None:
            return None
        table, most = self._table, self.config.num_speculative_tokens
        sampled = (ends == table.num_tokens[rows] + drafts) & table.may_draft[rows]
        count = np.minimum(table.total[rows] - ends - 2, np.minimum(self._limits(rows) + 2, most))
        return np.where(sampled, np.maximum(count, 0), 0).astype(np.int32)

    def started(self, batch: Batch, *, only_decode: bool) -> None:
        """A step is under way; its time says something if it does ``only_decode``."""
        if self._benefit is not None and only_decode and not batch.joined:
            self._timed[batch.step] = self._drafting

    def finished(self, batch: Batch, output: StepOutput, live: BoolArray, seconds: float) -> None:
        """Learn from a step: what was accepted, what it cost, what the draft model proposes.

        Args:
            batch: The step.
            output: What it produced.
            live: (R,) whether a row still belongs to the sequence that was in the batch.
            seconds: What the step took.
        """
        mine = live[batch.sampled]
        rows = batch.rows[batch.sampled]
        if batch.num_drafts is not None:
            self._checked(rows[mine], batch.num_drafts[mine], output.num_tokens[mine] - 1)
        if self._proposer is None:
            self._keep(rows[mine], None if output.drafts is None else output.drafts[mine])
        with_drafts = self._timed.pop(batch.step, None)
        if self._benefit is not None and with_drafts is not None and seconds > 0:
            tokens = int(output.num_tokens.sum())
            self._benefit.measured(len(rows), with_drafts, tokens, seconds)

    def dropped(self) -> None:
        """The steps under way will not come in."""
        self._timed.clear()

    def _keep(self, rows: IndexArray, drafts: IntArray | None) -> None:
        """Keep what the draft model proposes for each row, (n, k), for the next step."""
        if drafts is None:
            self._model_epoch[rows] = -1
            return
        self._from_model[rows] = -1
        self._from_model[rows, : drafts.shape[1]] = drafts
        self._model_epoch[rows] = self._table.epoch[rows]

    def _checked(self, rows: IndexArray, num_drafts: IntArray, num_accepted: IntArray) -> None:
        had = num_drafts > 0
        rows, num_drafts, num_accepted = rows[had], num_drafts[had], num_accepted[had]
        self.stats.num_drafts += len(rows)
        self.stats.num_draft_tokens += int(num_drafts.sum())
        self.stats.num_accepted_tokens += int(num_accepted.sum())
        limit = self._limit[rows]
        limit = np.where(num_accepted == num_drafts, limit + 2, num_accepted + 1)
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
