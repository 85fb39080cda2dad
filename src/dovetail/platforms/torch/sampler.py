"""Choosing the next token of each row, on the device; numpy never sees the logits.

The order of work is vLLM's: log-probabilities of the raw logits; token masks; allowed tokens,
biases and early stops; repetition, frequency and presence penalties; then the likeliest token where
the temperature is 0, and elsewhere temperature, min_p, top_k, top_p and a draw by the row's noise.

Drafts are checked by choosing at each of their places as if they were known, with that place's own
noise: a draft is accepted if it is the token that is chosen there. For guesses that are certain of
themselves this is rejection sampling (Leviathan et al., 2023): the draft d is accepted with its
probability p(d), and otherwise the token comes from p without d, so the distribution is p exactly.
The tokens are also the very ones that would have been chosen without drafts.

A row's token depends on nothing but its own logits, parameters and noise: not on the other rows,
their order or the number of threads, bit for bit (``sampling/weights.py`` says how).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch, JoinedRow, SamplingBatch
from dovetail.platforms.torch.sampling.choice import Choose, choose
from dovetail.platforms.torch.sampling.drafts import Accepted, Places
from dovetail.platforms.torch.sampling.logprobs import LogprobTensors, logprobs
from dovetail.platforms.torch.sampling.masks import masked
from dovetail.platforms.torch.sampling.rows import Rows, Which, on_device
from dovetail.platforms.torch.sampling.shaping import Shaper

__all__ = ["LogprobTensors", "SampleResult", "Sampler"]

_NONE_FAILED: Mapping[int, str] = {}


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """The tokens of each of S rows, on the device; see ``core.batch.StepOutput``."""

    chosen: Tensor
    """(S, W) int64; 0 where not finite."""
    num_tokens: Tensor
    """(S,) int64: how many of them are accepted."""
    finite: Tensor
    """(S,) bool: False where the logits hold NaN or +inf, or no token was left to choose."""
    token_ids: Tensor
    """(S,) int64: the last token of each row, which is the only one without drafts."""
    logprobs: LogprobTensors | None = None
    """Of all G places."""
    failures: Mapping[int, str] = field(default_factory=dict)
    """Why rows failed that are finite, by index into S."""


class _Chosen(NamedTuple):
    """One token for each of n places."""

    tokens: Tensor
    """(n,) int64; 0 where not finite."""
    finite: Tensor
    """(n,) bool"""
    failures: Mapping[int, str]
    """Why places failed in their row's rules."""


class Sampler:
    """Chooses tokens, and keeps what rows need for it from step to step.

    Args:
        vocab_size: V.
        max_rows: Rows are numbered below this.
        device: Of the logits; must have float64.
        choose: A platform's own.
    """

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        device: torch.device,
        choose: Choose = choose,
    ) -> None:
        self._choose_rows = choose
        self._shaper = Shaper(vocab_size, max_rows, device)
        self._scratch = torch.empty(0, vocab_size, device=device)
        self._heats: dict[int, float] = {}
        """Temperatures of rows whose log-probabilities are not those of the raw logits: beams."""

    def join(self, rows: Sequence[JoinedRow]) -> None:
        """Take over rows: what is kept for their former requests is dropped."""
        self._shaper.join(rows)
        for row in rows:
            self._heats.pop(row.row, None)
            if row.params.beam_temperature != 1.0:
                self._heats[row.row] = row.params.beam_temperature

    def logprobs(self, logits_NV: Tensor, chosen_N: Tensor, k: int) -> LogprobTensors:
        """Log-probabilities of the chosen tokens and the k likeliest: ``sampling.logprobs``."""
        return logprobs(logits_NV, chosen_N, k)

    @torch.inference_mode()
    def sample(self, logits_GV: Tensor, batch: Batch) -> SampleResult:
        """Tokens for each row of ``batch.sampled``, counted as output of its row.

        Args:
            logits_GV: One row for each place of ``batch.logit_index``, any float dtype; rows with a
                token mask are changed, others are not.
        """
        sampling, rows, raw = batch.sampling, batch.rows[batch.sampled], logits_GV
        if sampling.masks is not None:
            keep = sampling.num_logprobs is not None
            logits_GV = masked(logits_GV, sampling.masks, keep=keep)
        if batch.num_drafts is None:
            chosen = self._choose(logits_GV, sampling, rows, np.arange(len(rows)))
            failures, last = chosen.failures, chosen.tokens
            ones = torch.ones_like(chosen.tokens)
            accepted = Accepted(chosen.tokens[:, None], ones, chosen.finite)
        else:
            places = Places.of(batch, batch.num_drafts, logits_GV.device)
            chosen = self._choose_drafted(logits_GV, batch, rows, places)
            failures = places.rows_of(chosen.failures)
            accepted = places.accept(chosen.tokens, chosen.finite)
            last = accepted.token_ids.gather(1, (accepted.num_tokens - 1)[:, None])[:, 0]
        wanted = sampling.num_logprobs
        return SampleResult(
            chosen=accepted.token_ids,
            num_tokens=accepted.num_tokens,
            finite=accepted.finite,
            token_ids=last,
            logprobs=None
            if wanted is None
            else logprobs(self._heated(raw, batch), chosen.tokens, wanted),
            failures=failures,
        )

    def _choose_drafted(
        self, logits_GV: Tensor, batch: Batch, rows: Which, places: Places
    ) -> _Chosen:
        """A token for each of the G places.

        Places of rows without rules are chosen all at once. Where rules look at what the row has
        said, a place follows the one before it, and only while the drafts are right: what is
        chosen is then counted, and nothing else.
        """
        sampling = batch.sampling
        bound = self._shaper.bound(rows) if sampling.shapes_logits else np.zeros(len(rows), bool)
        free = np.flatnonzero(~bound.repeat(places.counts))
        tokens = torch.zeros(len(logits_GV), dtype=torch.int64, device=logits_GV.device)
        finite = torch.ones_like(tokens, dtype=torch.bool)
        failures: dict[int, str] = {}
        everyone = rows.repeat(places.counts)
        alive = np.flatnonzero(bound)
        number = 0
        while len(free) or len(alive):
            which = np.union1d(free, places.starts[alive] + number)
            at = on_device(which, logits_GV.device)
            chosen = self._choose(logits_GV, sampling, everyone[which], which)
            tokens[at], finite[at] = chosen.tokens, chosen.finite
            failures |= {int(which[i]): reason for i, reason in chosen.failures.items()}
            right = places.right(tokens, number)
            alive = alive[right[alive]] if len(alive) else alive
            free, number = free[:0], number + 1
        return _Chosen(tokens, finite, failures)

    def _choose(
        self, logits_GV: Tensor, sampling: SamplingBatch, rows: Which, which: Which
    ) -> _Chosen:
        """Tokens for places ``which`` (n,) of the G, at most one of each row with rules."""
        shaped = rows[:0]
        if sampling.shapes_logits:
            shaped = self._shaper.shaped(rows, sampling.num_generated[which])
        raw = Rows(logits_GV).subset(which)
        if len(shaped):
            chosen = self._choose_shaped(raw, which, sampling, rows, shaped)
            self._shaper.update(rows, chosen.tokens)
            return chosen
        return _Chosen(*self._choose_rows(raw, which, sampling), _NONE_FAILED)

    def _heated(self, logits_GV: Tensor, batch: Batch) -> Tensor:
        """The logits by whose log-probabilities the rows go; a copy if some are divided."""
        rows = batch.rows[batch.sampled]
        if batch.num_drafts is not None:
            rows = rows.repeat(batch.num_drafts + 1)
        heats = [self._heats.get(row, 1.0) for row in rows.tolist()] if self._heats else []
        if all(heat == 1.0 for heat in heats):
            return logits_GV
        divisors = on_device(np.array(heats, np.float32)[:, None], logits_GV.device)
        return logits_GV.float() / divisors

    def _choose_shaped(
        self, raw: Rows, which: Which, sampling: SamplingBatch, rows: Which, shaped: Which
    ) -> _Chosen:
        """The places ``shaped`` by their rules, the others as they are.

        Logits that are not finite before the rules are not afterwards.
        """
        tokens = torch.empty(len(rows), dtype=torch.int64, device=raw.device)
        finite = torch.empty(len(rows), dtype=torch.bool, device=raw.device)
        plain = np.setdiff1d(np.arange(len(rows)), shaped)
        if len(plain):
            at = on_device(plain, raw.device)
            part = raw.subset(plain)
            tokens[at], finite[at] = self._choose_rows(part, which[plain], sampling)
        x = self._room(len(shaped))
        for part_of, chunk in raw.subset(shaped).chunks():
            x[part_of] = chunk
        fine = torch.isfinite(x.amax(-1))
        failed = self._shaper.shape(x, rows[shaped], sampling.num_generated[which[shaped]])
        at = on_device(shaped.astype(np.int64), raw.device)
        found, left = self._choose_rows(Rows(x), which[shaped], sampling)
        tokens[at], finite[at] = torch.where(fine, found, 0), fine & left
        return _Chosen(
            tokens, finite, {int(shaped[place]): reason for place, reason in failed.items()}
        )

    def _room(self, num_rows: int) -> Tensor:
        """(n, V) float32, the same memory in every step."""
        if num_rows > len(self._scratch):
            self._scratch = self._scratch.new_empty(num_rows, self._scratch.shape[1])
        return self._scratch[:num_rows]
