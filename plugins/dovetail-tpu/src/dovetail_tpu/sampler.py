"""The host's half of choosing tokens: which kind of program a step needs, and what rows ask for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from dovetail.core.batch import Batch, JoinedRow, SamplingBatch
from dovetail_tpu.choice import Controls, Rules, Scores
from dovetail_tpu.meter import Meter
from dovetail_tpu.packing import pack
from dovetail_tpu.programs import Programs

__all__ = ["LEAST_SCORES", "Sampler"]

LEAST_SCORES = 32
"""Alternatives that every score has; more are rounded up to a power of two, and compiled then."""


class Sampler:
    """Chooses tokens; keeps each row's last one, and what rows with rules have said, on the device.

    Args:
        programs: Of the model.
        vocab_size: V.
        max_rows: Rows are numbered below this.
        meter: Runs programs.
    """

    def __init__(self, programs: Programs, vocab_size: int, max_rows: int, meter: Meter) -> None:
        self._programs, self._meter = programs, meter
        self._vocab_size, self._max_rows = vocab_size, max_rows
        self._rules: Rules | None = None
        """Made when a step first needs them, for they take memory."""
        self._ruled: set[int] = set()
        self._heats: dict[int, float] = {}
        """Temperatures of rows whose log-probabilities are not those of the raw logits: beams."""
        self.last: Array = programs.place(np.zeros(max_rows, np.int32))
        """(rows,) int32: the last token of each."""

    def join(self, rows: Sequence[JoinedRow]) -> None:
        """Take over rows: what is kept for their former requests is dropped."""
        for row in rows:
            self._heats.pop(row.row, None)
            if row.params.beam_temperature != 1.0:
                self._heats[row.row] = row.params.beam_temperature
            if row.params.shapes_logits:
                self._ruled.add(row.row)
                self._set(row.row, _rules_of(row, self._vocab_size))
            elif row.row in self._ruled:
                self._ruled.remove(row.row)
                self._set(row.row, Rules.none(self._vocab_size))

    def sample(self, weights: Any, hidden_ND: Array, batch: Batch) -> tuple[Array, Array]:
        """Tokens (N,) and whether they are finite; beyond the S rows that get one, nothing."""
        sampling, size = batch.sampling, hidden_ND.shape[0]
        rows = np.full(size, self._max_rows, np.int32)
        rows[: len(batch.sampled)] = batch.rows[batch.sampled]
        ruled = sampling.shapes_logits or sampling.masks is not None
        greedy = sampling.all_greedy and not ruled
        controls = None if greedy else Controls.of(sampling, size)
        bits = _bits(sampling, size, self._vocab_size) if ruled else None
        rules = self._all_rules() if ruled else None
        restricts = ruled or (sampling.restricts and not sampling.all_greedy)
        with jax.enable_x64(True):
            tokens, finite, self.last, kept = self._meter.run(
                "sample",
                self._programs.sample(restricts),
                weights,
                self.last,
                rules,
                hidden_ND,
                pack((rows, controls, bits)),
            )
        self._rules = self._rules if kept is None else kept
        return tokens, finite

    def scores(self, weights: Any, hidden_ND: Array, tokens: Any, batch: Batch) -> Scores:
        """Log-probabilities of the tokens that ``sample`` gave."""
        heats = [self._heats.get(row, 1.0) for row in batch.rows[batch.sampled].tolist()]
        k = batch.sampling.num_logprobs or 0
        return self.score(weights, hidden_ND, tokens, np.array(heats, np.float32), k)

    def score(self, weights: Any, hidden_ND: Array, tokens: Any, heats: Any, k: int) -> Scores:
        """Log-probabilities (N, 1 + k or more) of any tokens (N,); heats of the first rows."""
        size = hidden_ND.shape[0]
        width = min(max(LEAST_SCORES, 1 << (k - 1).bit_length()), self._vocab_size)
        heat = np.ones(size, np.float32)
        heat[: len(heats)] = heats
        with jax.enable_x64(True):
            scores: Scores = self._meter.run(
                f"score {width}", self._programs.score(width), weights, hidden_ND, tokens, heat
            )
        return scores

    def rehearse(self) -> None:
        """Run what changes rules, and give back the memory that they take until they are needed."""
        self._set(0, Rules.none(self._vocab_size))
        self._rules = None

    def _set(self, row: int, new: Rules) -> None:
        number = np.array(row, np.int32)
        rules = self._all_rules()
        self._rules = self._meter.run("set row", self._programs.set_row, rules, number, new)

    def _all_rules(self) -> Rules:
        if self._rules is None:
            self._rules = self._meter.run("no rules", self._programs.no_rules)
        return self._rules


def _bits(sampling: SamplingBatch, size: int, vocab_size: int) -> np.ndarray[Any, Any]:
    """(N, ceil(V / 32)) the masks of all rows: everything is allowed where there is none."""
    bits = np.full((size, -(-vocab_size // 32)), -1, np.int32)
    if sampling.masks is not None:
        bits[sampling.masks.places] = sampling.masks.bits
    return bits


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
    rules.strength[:] = (
        params.repetition_penalty,
        params.frequency_penalty,
        params.presence_penalty,
        params.min_tokens,
    )
    return rules


def _inside(ids: Sequence[int], vocab_size: int) -> np.ndarray[Any, Any]:
    array = np.array(ids, np.int64)
    return array[array < vocab_size]
