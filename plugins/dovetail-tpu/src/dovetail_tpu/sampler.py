"""The host's half of choosing tokens: what rows ask for, step by step and from when they join."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from dovetail.core.batch import Batch, JoinedRow, TokenMasks
from dovetail.core.buckets import padded
from dovetail.core.types import FloatArray, IntArray
from dovetail_tpu.choice import Controls, Rules, Scores
from dovetail_tpu.programs import Programs
from dovetail_tpu.transfers import pack

__all__ = ["Sampler"]

_LEAST_SCORES = 32
"""Alternatives that every score has; more are rounded up to a power of two, and compiled then."""
_OF_STEP, _OF_REQUEST = Controls._fields[:6], Controls._fields[6:]


class Sampler:
    """Chooses tokens; keeps each row's last one, and what rows with rules have said, on the device.

    Args:
        programs: Of the model.
        vocab_size: V.
        max_rows: Rows are numbered below this.
    """

    def __init__(self, programs: Programs, vocab_size: int, max_rows: int) -> None:
        self._programs, self._vocab_size, self._max_rows = programs, vocab_size, max_rows
        self._wishes = np.zeros((len(_OF_REQUEST), max_rows), np.float32)
        """What each row's request asks of all its steps."""
        self.heats = np.ones(max_rows, np.float32)
        """Temperatures of log-probabilities: 1 gives those of the raw logits; beams have others."""
        tables, row = programs.place(Rules.none(max_rows, vocab_size)), np.array(0, np.int32)
        # Changes nothing, but the program is there when a row with rules joins.
        self._rules: Rules = programs.set_row(tables, row, Rules.none(vocab_size))
        self.last: Array = programs.place(np.zeros(max_rows, np.int32))
        """(rows,) int32: the last token of each."""

    def join(self, rows: Sequence[JoinedRow]) -> None:
        """Take over rows: what is kept for their former requests is dropped."""
        for row in rows:
            self.heats[row.row] = row.params.beam_temperature
            self._wishes[:, row.row] = [getattr(row.params, name) for name in _OF_REQUEST]
            if row.params.shapes_logits:
                number, rules = np.array(row.row, np.int32), _rules_of(row, self._vocab_size)
                self._rules = self._programs.set_row(self._rules, number, rules)

    def sample(self, hidden_ND: Array, batch: Batch) -> tuple[Array, Array]:
        """Tokens (N,) and whether they are finite; beyond the S rows that get one, nothing."""
        sampling, sampled, size = batch.sampling, batch.rows[batch.sampled], len(hidden_ND)
        rows = np.full(size, self._max_rows, np.int32)
        rows[: len(sampled)] = sampled
        way = np.array(0 if sampling.all_greedy else 1 + sampling.restricts, np.int32)
        numbers = [getattr(sampling, name) for name in _OF_STEP]
        controls = np.array([*numbers, *self._wishes[:, sampled]], np.float32)
        rules = bits = None
        if sampling.shapes_logits or sampling.masks is not None:
            rules, bits = self._rules, self._bits(sampling.masks, size)
        packed = pack((rows, way, padded(controls, size, axis=1), bits))
        with jax.enable_x64(True):
            tokens, finite, self.last, rules = self._programs.sample(
                self.last, rules, hidden_ND, packed
            )
        self._rules = rules or self._rules
        return tokens, finite

    def _bits(self, masks: TokenMasks | None, size: int) -> IntArray:
        """(N, ceil(V / 32)) the masks of all rows: everything is allowed where there is none."""
        bits = np.full((size, -(-self._vocab_size // 32)), -1, np.int32)
        if masks is not None:
            bits[masks.places] = masks.bits
        return bits

    def score(self, hidden_ND: Array, tokens: Any, heats: FloatArray, k: int) -> Scores:
        """Log-probabilities (N, 1 + k or more) of tokens (N,); of those behind the heats, void."""
        width = min(max(_LEAST_SCORES, 1 << (k - 1).bit_length()), self._vocab_size)
        heat = padded(heats, len(hidden_ND))
        with jax.enable_x64(True):
            scores: Scores = self._programs.score(width)(hidden_ND, tokens, heat)
        return scores


def _rules_of(row: JoinedRow, vocab_size: int) -> Rules:
    """What a request asks for, and what it has said already. Ids beyond the vocabulary are void."""
    rules, params = Rules.none(vocab_size), row.params
    if params.allowed_token_ids:
        rules.bias[:] = -np.inf
        rules.bias[_inside(params.allowed_token_ids, vocab_size)] = 0
    for token, bias in (params.logit_bias or {}).items():
        if token < vocab_size:
            rules.bias[token] += bias
    rules.stops[_inside(row.stop_token_ids, vocab_size)] = True
    rules.seen[row.token_ids] = True
    np.add.at(rules.counts, row.token_ids[row.num_prompt_tokens :], 1)
    return rules


def _inside(ids: Sequence[int], vocab_size: int) -> list[int]:
    return [token for token in ids if token < vocab_size]
