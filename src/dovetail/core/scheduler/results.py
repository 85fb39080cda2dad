"""Reads a step's output into the row table and into what users are told."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from dovetail.core.batch import Batch, LogprobArrays, StepOutput
from dovetail.core.errors import InvariantError
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.types import BoolArray
from dovetail.core.update import TokenAlternatives, Update

__all__ = ["sequence_updates"]

NOT_FINITE = "the model's logits were not finite numbers for this request"


def sequence_updates(
    table: RowTable, batch: Batch, output: StepOutput, live: BoolArray
) -> Iterator[tuple[Update, Sequence]]:
    """Write the new tokens of live rows to the table, then yield one update per row.

    ``live`` (R,) tells which rows still belong to the sequence that was in the batch. The caller
    may end a sequence as soon as it has its update.
    """
    if output.token_ids.shape[1] != 1:
        raise InvariantError("engine", "a step gave several tokens per row, none were drafted")
    prompt_parts = _prompt_logprobs(table, batch, output, live)
    mask = live[batch.sampled]
    rows = batch.rows[batch.sampled]
    tokens = output.token_ids[:, 0]
    if not mask.all():
        rows, tokens = rows[mask], tokens[mask]
    known = table.num_known[rows]
    table.tokens[rows, known] = tokens
    table.num_known[rows] = known + 1
    stopped = (table.stop_ids[rows] == tokens[:, None]).any(axis=1)
    ended = stopped | (known + 1 >= table.total[rows]) | ~output.finite[mask]
    special = ended | (table.wants_logprobs[rows] > 0) | (known == table.num_prompt[rows])
    indices = np.flatnonzero(mask)
    for i, (row, token) in enumerate(zip(rows.tolist(), tokens.tolist(), strict=True)):
        sequence = table.at(row)
        update = Update(id=sequence.request.id, token_ids=[token])
        if special[i]:
            _complete(update, sequence, output, int(indices[i]), bool(stopped[i]), bool(ended[i]))
        if prompt_parts and sequence in prompt_parts:
            update.prompt_logprobs = prompt_parts.pop(sequence)
        yield update, sequence
    for sequence, parts in prompt_parts.items():
        yield Update(id=sequence.request.id, token_ids=[], prompt_logprobs=parts), sequence


def _complete(
    update: Update, sequence: Sequence, output: StepOutput, i: int, stopped: bool, ended: bool
) -> None:
    """Fill in what most updates lack: the end, log-probabilities, the cache hits."""
    params = sequence.request.params
    if not output.finite[i]:
        update.token_ids, update.finish_reason, update.error = [], "error", NOT_FINITE
        return
    if ended:
        update.finish_reason = "stop" if stopped else "length"
    if stopped and update.token_ids[0] in params.stop_token_ids:
        update.stop_reason = update.token_ids[0]
    if params.logprobs is not None and output.logprobs is not None:
        update.logprobs = [_alternatives(output.logprobs, i, params.logprobs)]
    update.num_cached_tokens = sequence.num_cached_tokens


def _alternatives(arrays: LogprobArrays, i: int, count: int) -> TokenAlternatives:
    return TokenAlternatives(
        token_ids=arrays.token_ids[i, : count + 1].tolist(),
        logprobs=arrays.logprobs[i, : count + 1].tolist(),
        rank=int(arrays.ranks[i]),
    )


def _prompt_logprobs(
    table: RowTable, batch: Batch, output: StepOutput, live: BoolArray
) -> dict[Sequence, list[TokenAlternatives]]:
    """The new pieces of prompt log-probabilities, by sequence; counts them as sent."""
    need, arrays = batch.prompt_logprobs, output.prompt_logprobs
    parts: dict[Sequence, list[TokenAlternatives]] = {}
    if need is None or arrays is None:
        return parts
    for i, batch_row in enumerate(batch.row_of_token[need.token_index].tolist()):
        sequence = table.sequences[int(batch.rows[batch_row])] if live[batch_row] else None
        if sequence is not None:
            count = sequence.request.params.prompt_logprobs or 0
            parts.setdefault(sequence, []).append(_alternatives(arrays, i, count))
            sequence.num_prompt_logprobs += 1
    return parts
