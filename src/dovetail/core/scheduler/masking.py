"""Rows under a grammar: what they may choose next, and where they are once they have chosen."""

from __future__ import annotations

import numpy as np

from dovetail.core.batch import Batch, TokenMasks
from dovetail.core.errors import InvariantError
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.structured.base import Grammars
from dovetail.core.types import BoolArray, IndexArray, IntArray
from dovetail.core.update import Update

__all__ = ["advance_grammars", "token_masks"]


def token_masks(
    table: RowTable, grammars: Grammars, rows: IndexArray, num_drafts: IntArray | None = None
) -> TokenMasks | None:
    """Masks for those of ``rows`` that have a grammar; None if there are none.

    Args:
        table: All tokens of the rows that have a grammar are known, and their drafts behind them.
        grammars: Asked for these rows.
        rows: (S,) the rows that get a token.
        num_drafts: (S,) drafts of each row; they take places behind the row's first.
    """
    if not table.num_grammars:
        return None
    which = np.flatnonzero(table.has_grammar[rows])
    if not len(which):
        return None
    mine = rows[which]
    ids = table.request_id[mine].tolist()
    known = table.num_known[mine]
    num_generated = (known - table.num_prompt[mine]).tolist()
    if num_drafts is None:
        bits = grammars.masks(ids, num_generated)
        return TokenMasks(places=which.astype(np.int32), bits=bits)
    ends = np.cumsum(num_drafts + 1)
    starts = ends - num_drafts - 1
    places = [np.arange(starts[i], ends[i], dtype=np.int32) for i in which.tolist()]
    spans = zip(mine.tolist(), known.tolist(), num_drafts[which].tolist(), strict=True)
    drafts = [table.tokens[row, start : start + count].tolist() for row, start, count in spans]
    bits = grammars.masks(ids, num_generated, drafts)
    return TokenMasks(places=np.concatenate(places), bits=bits)


def advance_grammars(
    table: RowTable,
    grammars: Grammars,
    batch: Batch,
    live: BoolArray,
    updates: list[Update],
    notable: list[tuple[Update, Sequence]],
) -> None:
    """Tell the grammars which tokens their rows were given; end those that are complete.

    Args:
        table: The step's tokens are in it.
        grammars: Of the rows.
        batch: The step.
        live: (R,) whether a row still belongs to the sequence that was in the batch.
        updates: The first of them are of the live sampled rows, in order. Changed where a row ends.
        notable: Those that end are added.
    """
    rows = batch.rows[batch.sampled][live[batch.sampled]]
    for k in np.flatnonzero(table.has_grammar[rows]).tolist():
        update, sequence = updates[k], table.at(int(rows[k]))
        if update.id != sequence.request.id:
            raise InvariantError("engine", f"update {k} is not of the row's request")
        if update.error is not None or not update.token_ids:
            continue
        had_ended = update.finish_reason is not None
        accepted = grammars.accept(update.id, update.token_ids)
        if accepted.error is not None:
            update.token_ids, update.logprobs = [], None
            update.finish_reason, update.error = "error", accepted.error
        elif accepted.complete:
            update.token_ids = update.token_ids[: accepted.num_tokens]
            if update.logprobs is not None:
                update.logprobs = update.logprobs[: accepted.num_tokens]
            update.finish_reason = "stop"
        is_noted = had_ended or any(other is update for other, _ in notable)
        if update.finish_reason is not None and not is_noted:
            notable.append((update, sequence))
