"""Turns decisions (which rows compute how many tokens) into a complete ``Batch``."""

from __future__ import annotations

import numpy as np

from dovetail.core.batch import Batch, JoinedRow, PromptLogprobNeed, SamplingBatch, TokenMasks
from dovetail.core.sampling.noise import uniform
from dovetail.core.scheduler.masking import token_masks
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.structured.base import Grammars
from dovetail.core.types import IntArray

__all__ = ["assemble_batch"]

_NO_ROWS = np.zeros(0, np.int32)
_NO_COPIES = np.zeros((0, 2), np.int32)


def assemble_batch(
    table: RowTable,
    step: int,
    rows: IntArray,
    query_lens: IntArray,
    joined: tuple[JoinedRow, ...],
    copies: list[tuple[int, int]],
    grammars: Grammars,
) -> Batch:
    """The batch in which each of ``rows`` computes its next ``query_lens`` tokens.

    Reads the table and changes nothing in it; asks the grammars of the rows that get a token. All
    arrays of the batch are copies, so that the table may go on changing while the step runs.
    """
    context = table.num_computed[rows]
    ends = context + query_lens
    token_ids, carried, carried_rows = _tokens(table, rows, query_lens, context)
    sampled = np.flatnonzero(ends == table.num_tokens[rows]).astype(np.int32)
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
        sampling=_sampling(table, rows[sampled], token_masks(table, grammars, rows[sampled])),
        joined=joined,
        copies=np.array(copies, np.int32) if copies else _NO_COPIES,
        prompt_logprobs=_prompt_logprobs(table, rows, query_lens, context),
    )


def _tokens(
    table: RowTable, rows: IntArray, query_lens: IntArray, context: IntArray
) -> tuple[IntArray, IntArray, IntArray]:
    """Token ids (T,), and the entries that the device fills in: their indices and their rows."""
    num_tokens = int(query_lens.sum())
    if num_tokens == len(rows):
        token_rows, positions = rows, context
    else:
        token_rows = rows.repeat(query_lens)
        starts = np.cumsum(query_lens) - query_lens
        positions = np.arange(num_tokens, dtype=np.int32) + (context - starts).repeat(query_lens)
    token_ids = table.tokens[token_rows, positions]
    unknown = positions >= table.num_known[token_rows]
    if not unknown.any():
        return token_ids, _NO_ROWS, _NO_ROWS
    token_ids[unknown] = 0
    carried = np.flatnonzero(unknown).astype(np.int32)
    return token_ids, carried, token_rows[carried]


def _sampling(table: RowTable, rows: IntArray, masks: TokenMasks | None) -> SamplingBatch:
    fixed = table.sampling_of(rows)
    num_tokens = table.num_tokens[rows]
    return SamplingBatch(
        temperature=fixed.temperature,
        top_k=fixed.top_k,
        top_p=fixed.top_p,
        min_p=fixed.min_p,
        uniform=fixed.no_noise if fixed.all_greedy else uniform(fixed.seed, num_tokens),
        num_generated=num_tokens - table.num_prompt[rows],
        all_greedy=fixed.all_greedy,
        restricts=fixed.restricts,
        shapes_logits=fixed.shapes_logits,
        num_logprobs=fixed.num_logprobs,
        masks=masks,
    )


def _prompt_logprobs(
    table: RowTable, rows: IntArray, query_lens: IntArray, context: IntArray
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
