"""Choosing the next token of each row, on the device; numpy never sees the logits.

The order of work is vLLM's: log-probabilities of the raw logits; allowed tokens, biases and early
stops; repetition, frequency and presence penalties; then the likeliest token where the temperature
is 0, and elsewhere temperature, min_p, top_k, top_p and a draw by the row's noise.

A row's token depends on nothing but its own logits, parameters and noise: not on the other rows,
their order or the number of threads, bit for bit (``sampling/weights.py`` says how).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch, JoinedRow, SamplingBatch
from dovetail.platforms.torch.sampling.choice import Restrict, choose
from dovetail.platforms.torch.sampling.logprobs import LogprobTensors, logprobs
from dovetail.platforms.torch.sampling.rows import Rows, Which, on_device
from dovetail.platforms.torch.sampling.shaping import Shaper

__all__ = ["LogprobTensors", "SampleResult", "Sampler"]

_NONE_FAILED: Mapping[int, str] = {}


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """One token for each of S rows, on the device."""

    token_ids: Tensor
    """(S,) int64; 0 where not finite."""
    finite: Tensor
    """(S,) bool: False where the logits hold NaN or +inf, or no token was left to choose."""
    logprobs: LogprobTensors | None = None
    failures: Mapping[int, str] = field(default_factory=dict)
    """Why rows failed that are finite, by index into S."""


class Sampler:
    """Chooses tokens, and keeps what rows need for it from step to step.

    Args:
        vocab_size: V.
        max_rows: Rows are numbered below this.
        device: Of the logits; must have float64.
        restrict: A platform's own min_p, top_k and top_p, exact as ``restriction.by_sort`` is.
    """

    def __init__(
        self,
        vocab_size: int,
        max_rows: int,
        device: torch.device,
        restrict: Restrict | None = None,
    ) -> None:
        self._restrict = restrict
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
    def sample(self, logits_SV: Tensor, batch: Batch) -> SampleResult:
        """One token per row of ``batch.sampled``, counted as output of its row.

        Args:
            logits_SV: Any float dtype; not changed.
        """
        sampling, rows = batch.sampling, batch.rows[batch.sampled]
        shaped, failures = rows[:0], _NONE_FAILED
        if sampling.shapes_logits:
            shaped = self._shaper.shaped(rows, sampling.num_generated)
        if len(shaped):
            tokens, peak, failures = self._choose_shaped(logits_SV, sampling, rows, shaped)
        else:
            tokens, peak = choose(Rows(logits_SV), np.arange(len(rows)), sampling, self._restrict)
        finite = torch.isfinite(peak)
        tokens = torch.where(finite, tokens, 0)
        if len(shaped):
            self._shaper.update(rows, tokens)
        wanted = sampling.num_logprobs
        return SampleResult(
            token_ids=tokens,
            finite=finite,
            logprobs=None
            if wanted is None
            else logprobs(self._heated(logits_SV, rows), tokens, wanted),
            failures=failures,
        )

    def _heated(self, logits_SV: Tensor, rows: Which) -> Tensor:
        """The logits by whose log-probabilities the rows go; a copy if some are divided."""
        heats = [self._heats.get(row, 1.0) for row in rows.tolist()] if self._heats else []
        if all(heat == 1.0 for heat in heats):
            return logits_SV
        divisors = on_device(np.array(heats, np.float32)[:, None], logits_SV.device)
        return logits_SV.float() / divisors

    def _choose_shaped(
        self, logits_SV: Tensor, sampling: SamplingBatch, rows: Which, shaped: Which
    ) -> tuple[Tensor, Tensor, Mapping[int, str]]:
        """Tokens (S,) and peaks (S,): the places ``shaped`` by their rules, the others as they are.

        The peak is also NaN where the logits are not finite before the rules. Third: why rows
        failed in their rules, by place.
        """
        raw = Rows(logits_SV)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=raw.device)
        peak = torch.empty(len(rows), device=raw.device)
        plain = np.setdiff1d(np.arange(len(rows)), shaped)
        if len(plain):
            at = raw.places(plain)
            tokens[at], peak[at] = choose(raw.subset(plain), plain, sampling, self._restrict)
        x = self._room(len(shaped))
        for part, chunk in raw.subset(shaped).chunks():
            x[part] = chunk
        fine = torch.isfinite(x.amax(-1))
        failed = self._shaper.shape(x, rows[shaped], sampling.num_generated[shaped])
        at = raw.places(shaped)
        tokens[at], most = choose(Rows(x), shaped, sampling, self._restrict)
        peak[at] = torch.where(fine, most, torch.nan)
        return tokens, peak, {int(shaped[place]): reason for place, reason in failed.items()}

    def _room(self, num_rows: int) -> Tensor:
        """(n, V) float32, the same memory in every step."""
        if num_rows > len(self._scratch):
            self._scratch = self._scratch.new_empty(num_rows, self._scratch.shape[1])
        return self._scratch[:num_rows]
