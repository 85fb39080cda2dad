"""Reads a step's output into the row table and into what users are told."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from dovetail.core.batch import Batch, LogprobArrays, StepOutput
from dovetail.core.faults import fault
from dovetail.core.plugins.registry import describe_error
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.types import BoolArray, IndexArray, IntArray
from dovetail.core.update import TokenAlternatives, Update

__all__ = ["sequence_updates"]

_log = logging.getLogger(__name__)

NOT_FINITE = "the model's logits were not finite numbers for this request"


def sequence_updates(
    table: RowTable, batch: Batch, output: StepOutput, live: BoolArray
) -> tuple[list[Update], list[tuple[Update, Sequence]]]:
    """Write the new tokens of live rows to the table; one update per row that has news.

    Args:
        table: Tokens and counters of these rows are changed.
        batch: The step.
        output: What it produced.
        live: (R,) whether a row still belongs to the sequence that was in the batch.

    Returns:
        All updates, and those with more to them than a token (the first token, an end, an error,
        log-probabilities) with their sequences.
    """
    output = _checked(output, table.vocab_size)
    indices = live[batch.sampled].nonzero()[0]
    rows = batch.rows[batch.sampled][indices]
    known = table.num_known[rows]
    tokens, counts, stopped = _emitted(table, output, indices, rows, known)
    if batch.num_drafts is not None:
        drafted = rows[batch.num_drafts[indices] > 0]
        table.num_tokens[drafted] = table.num_known[drafted]
        table.num_computed[drafted] = table.num_known[drafted] - 1
    ended = stopped | (known + counts >= table.total[rows]) | ~output.finite[indices]
    if output.failures:
        ended |= np.isin(indices, list(output.failures))
    special = ended | (table.wants_logprobs[rows] > 0) | (known == table.num_prompt[rows])
    updates = list(map(Update, table.request_id[rows].tolist(), tokens))
    notable = []
    for k in special.nonzero()[0].tolist():
        sequence, i = table.at(int(rows[k])), int(indices[k])
        try:
            fault("scheduler.result", updates[k].id)
            _complete(updates[k], sequence, batch, output, i, bool(stopped[k]), bool(ended[k]))
        except Exception as error:
            _fail(updates[k], error)
        notable.append((updates[k], sequence))
    if batch.prompt_logprobs is not None:
        _add_prompt_logprobs(updates, notable, table, batch, output, live)
    return updates, notable


def _checked(output: StepOutput, vocab_size: int) -> StepOutput:
    """The output, in which rows that were given tokens that do not exist have failed."""
    tokens_SW = output.token_ids
    if not tokens_SW.size or int(tokens_SW.astype(np.uint32).max()) < vocab_size:
        return output
    wrong = np.flatnonzero(((tokens_SW < 0) | (tokens_SW >= vocab_size)).any(axis=1))
    reason = f"I25: the runner gave a token that is not from 0 to {vocab_size - 1}"
    return replace(output, failures={**dict.fromkeys(wrong.tolist(), reason), **output.failures})


def _fail(update: Update, error: Exception) -> None:
    """End the request of this update, and nobody else's."""
    _log.error("the result of request %d could not be completed", update.id, exc_info=error)
    update.token_ids, update.logprobs, update.prompt_logprobs = [], None, None
    update.finish_reason, update.error = "error", describe_error(error)


def _emitted(
    table: RowTable, output: StepOutput, indices: IndexArray, rows: IndexArray, known: IntArray
) -> tuple[list[list[int]], IntArray, BoolArray]:
    """Write the tokens that rows were given to the table.

    Args:
        table: Tokens and counters of the rows are changed.
        output: What the step produced.
        indices: (n,) places of the live rows among its S.
        rows: (n,) these rows.
        known: (n,) tokens that were known of each.

    Returns:
        Per row its new tokens, up to a stop token or the row's end; how many, (n,); whether the
        last one is a stop token, (n,).
    """
    if output.token_ids.shape[1] == 1:
        tokens = output.token_ids[indices, 0]
        table.tokens[rows, known] = tokens
        table.num_known[rows] = known + 1
        stopped = table.stops.found(rows, tokens)
        return tokens[:, None].tolist(), np.ones(len(rows), np.int32), stopped
    tokens_NW = output.token_ids[indices]
    place = np.arange(tokens_NW.shape[1])
    counts = np.minimum(output.num_tokens[indices], table.total[rows] - known)
    stops = table.stops.found(rows, tokens_NW) & (place < counts[:, None])
    stopped = stops.any(axis=1)
    counts = np.where(stopped, stops.argmax(axis=1) + 1, counts).astype(np.int32)
    valid = place < counts[:, None]
    table.tokens[rows.repeat(counts), (known[:, None] + place)[valid]] = tokens_NW[valid]
    table.num_known[rows] = known + counts
    several = [ids[:count] for ids, count in zip(tokens_NW.tolist(), counts.tolist(), strict=True)]
    return several, counts, stopped


def _complete(
    update: Update,
    sequence: Sequence,
    batch: Batch,
    output: StepOutput,
    i: int,
    stopped: bool,
    ended: bool,
) -> None:
    """Fill in what most updates lack: the end, log-probabilities, the cache hits."""
    params = sequence.request.params
    error = output.failures.get(i) if output.finite[i] else NOT_FINITE
    if error is not None:
        update.token_ids, update.finish_reason, update.error = [], "error", error
        return
    if ended:
        update.finish_reason = "stop" if stopped else "length"
    if stopped and update.token_ids[-1] in (params.stop_token_ids or ()):
        update.stop_reason = update.token_ids[-1]
    if params.logprobs is not None and output.logprobs is not None:
        first = i if batch.num_drafts is None else i + int(batch.num_drafts[:i].sum())
        update.logprobs = [
            _alternatives(output.logprobs, place, params.logprobs)
            for place in range(first, first + len(update.token_ids))
        ]
    update.num_cached_tokens = sequence.num_cached_tokens


def _alternatives(arrays: LogprobArrays, i: int, count: int) -> TokenAlternatives:
    return TokenAlternatives(
        token_ids=arrays.token_ids[i, : count + 1].tolist(),
        logprobs=arrays.logprobs[i, : count + 1].tolist(),
        rank=int(arrays.ranks[i]),
    )


def _add_prompt_logprobs(
    updates: list[Update],
    notable: list[tuple[Update, Sequence]],
    table: RowTable,
    batch: Batch,
    output: StepOutput,
    live: BoolArray,
) -> None:
    """Add new pieces of prompt log-probabilities to the updates; count them as sent."""
    need, arrays = batch.prompt_logprobs, output.prompt_logprobs
    if need is None or arrays is None:
        return
    by_id = {update.id: update for update in updates}
    owners = batch.row_of_token[need.token_index]
    for batch_row in np.unique(owners[live[owners]]).tolist():
        sequence = table.at(int(batch.rows[batch_row]))
        update = by_id.get(sequence.request.id)
        if update is None:
            update = Update(id=sequence.request.id, token_ids=[])
            updates.append(update)
        if update.error is not None:
            continue
        places = np.flatnonzero(owners == batch_row).tolist()
        try:
            fault("scheduler.result", update.id)
            count = sequence.request.params.prompt_logprobs or 0
            update.prompt_logprobs = [_alternatives(arrays, i, count) for i in places]
            sequence.num_prompt_logprobs += len(places)
        except Exception as error:
            _fail(update, error)
            if all(other is not update for other, _ in notable):
                notable.append((update, sequence))
