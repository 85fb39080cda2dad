"""Turns decisions (which rows compute how many tokens) into a complete ``Batch``."""

from __future__ import annotations

import numpy as np

from dovetail.core.batch import Batch, JoinedRow, PromptLogprobNeed, SamplingBatch
from dovetail.core.sampling.noise import drawn
from dovetail.core.scheduler.masking import token_masks
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.structured.base import Grammars
from dovetail.core.types import IndexArray, IntArray

__all__ = ["assemble_batch"]

_NONE = np.zeros(0, np.intp)
_NO_COPIES = np.zeros((0, 2), np.int32)


def assemble_batch(
    table: RowTable,
    step: int,
    rows: IndexArray,
    query_lens: IntArray,
    joined: tuple[JoinedRow, ...],
    copies: list[tuple[int, int]],
    grammars: Grammars,
    drafts: IntArray | None = None,
    ahead: IntArray | None = None,
) -> Batch:
    """The batch in which each of ``rows`` computes its next ``query_lens`` tokens.

    Reads the table and changes nothing in it; asks the grammars of the rows that get a token. All
    arrays of the batch are copies, so that the table may go on changing while the step runs.

    Args:
        table: The rows.
        step: Number of the step.
        rows: (R,)
        query_lens: (R,)
        joined: Rows that are taken over.
        copies: Blocks to copy first.
        grammars: Of those rows that have one.
        drafts: (R,) how many of the row's tokens are drafts; None: none of any row.
        ahead: (R,) drafts wanted from the draft model; None: none.
    """
    context = table.num_computed[rows]
    ends = table.num_tokens[rows] if drafts is None else table.num_tokens[rows] + drafts
    known = table.num_known[rows] if drafts is None else table.num_known[rows] + drafts
    token_ids, carried, carried_rows = _tokens(table, rows, query_lens, context, known)
    sampled = (context + query_lens == ends).nonzero()[0]
    num_drafts = None if drafts is None else drafts[sampled]
    width = max(1, int(table.num_blocks[rows].max()))
    return Batch(
        step=step,
        rows=rows,
        query_lens=query_lens,
        context_lens=context,
        block_tables=table.blocks[rows, :width],
        token_ids=token_ids,
        carried=carried,
        carried_rows=carried_rows,
        sampled=sampled,
        num_drafts=num_drafts,
        num_drafts_wanted=None if ahead is None else ahead[sampled],
        sampling=_sampling(table, rows[sampled], num_drafts, grammars),
        joined=joined,
        copies=np.array(copies, np.int32) if copies else _NO_COPIES,
        prompt_logprobs=_prompt_logprobs(table, rows, query_lens, context),
    )


def _tokens(
    table: RowTable, rows: IndexArray, query_lens: IntArray, context: IntArray, known: IntArray
) -> tuple[IntArray, IndexArray, IndexArray]:
    """Token ids (T,), and the entries that the device fills in: their indices and their rows.

    Those are the ones from position ``known`` (R,) of their row.
    """
    num_tokens = int(query_lens.sum())
    if num_tokens == len(rows):
        token_rows, positions = rows, context
    else:
        token_rows, known = rows.repeat(query_lens), known.repeat(query_lens)
        starts = np.cumsum(query_lens) - query_lens
        positions = np.arange(num_tokens, dtype=np.int32) + (context - starts).repeat(query_lens)
    token_ids = table.tokens[token_rows, positions]
    unknown = positions >= known
    if not unknown.any():
        return token_ids, _NONE, _NONE
    token_ids[unknown] = 0
    carried = unknown.nonzero()[0]
    return token_ids, carried, token_rows[carried]


def _sampling(
    table: RowTable, rows: IndexArray, num_drafts: IntArray | None, grammars: Grammars
) -> SamplingBatch:
    """How the G places choose: a row's parameters for each, and noise by position."""
    masks = token_masks(table, grammars, rows, num_drafts)
    if num_drafts is None:
        num_tokens = table.num_tokens[rows]
    else:
        places = num_drafts + 1
        starts = np.cumsum(places) - places
        within = np.arange(int(places.sum()), dtype=np.int32) - starts.repeat(places)
        rows = rows.repeat(places)
        num_tokens = table.num_tokens[rows] + within
    fixed = table.sampling_of(rows)
    return SamplingBatch(
        temperature=fixed.temperature,
        top_k=fixed.top_k,
        top_p=fixed.top_p,
        min_p=fixed.min_p,
        uniform=fixed.no_noise if fixed.all_greedy else drawn(fixed.noise, num_tokens),
        num_generated=num_tokens - table.num_prompt[rows],
        all_greedy=fixed.all_greedy,
        restricts=fixed.restricts,
        shapes_logits=fixed.shapes_logits,
        num_logprobs=fixed.num_logprobs,
        masks=masks,
    )


def _prompt_logprobs(
    table: RowTable, rows: IndexArray, query_lens: IntArray, context: IntArray
) -> PromptLogprobNeed | None:
    """Positions of this step whose successor is a prompt token and was not reported before."""
    wanted = np.flatnonzero(table.wants_prompt_logprobs[rows])
    if not len(wanted):
        return None
    starts = np.cumsum(query_lens) - query_lens
    indices, targets, alternatives = [], [], 0
    for i in wanted.tolist():
        row, first = int(rows[i]), int(context[i])
        sequence = table.sequences[row]
        if sequence is None:
            continue
        begin = max(first, sequence.num_prompt_logprobs)
        end = min(first + int(query_lens[i]), sequence.num_prompt_tokens - 1)
        if begin < end:
            offset = int(starts[i]) - first
            indices.append(np.arange(begin + offset, end + offset, dtype=np.int32))
            targets.append(table.tokens[row, begin + 1 : end + 1])
            alternatives = max(alternatives, sequence.request.params.prompt_logprobs or 0)
    if not indices:
        return None
    return PromptLogprobNeed(
        token_index=np.concatenate(indices),
        target=np.concatenate(targets),
        num_logprobs=alternatives,
    )
