"""What single requests do to their logits.

First allowed tokens, biases, early stops and bad words; then logits processors of plug-ins; then
penalties.

State is kept only for rows that ask for any of it, on the device, and is brought up to date there
from the sampled tokens, so that the next step may start before the host has seen them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import JoinedRow
from dovetail.core.faults import fault
from dovetail.core.plugins.registry import describe_error
from dovetail.core.types import BoolArray, IntArray
from dovetail.platforms.torch.sampling.bad_words import BadWords
from dovetail.platforms.torch.sampling.penalties import Penalties
from dovetail.platforms.torch.sampling.processors import Processors
from dovetail.platforms.torch.sampling.rows import Which, on_device

__all__ = ["Shaper"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class _Rule:
    """What one row asks for. Ids outside the vocabulary are left out."""

    allowed: Tensor | None
    bias_ids: Tensor
    bias: Tensor
    stops: Tensor
    min_tokens: int
    request_id: int
    lasts: bool
    """Something but min_tokens is asked for."""

    def applies(self, num_generated: int) -> bool:
        return self.lasts or num_generated < self.min_tokens


class Shaper:
    """Per-row rules and penalty state.

    Args:
        vocab_size: V.
        max_rows: The largest number of rows that may have state.
        device: Where the logits are.
    """

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._rules: dict[int, _Rule] = {}
        self._broken: dict[int, str] = {}
        """Rows whose rules could not be taken up, and why; the rest of their rules are void."""
        self._penalties = Penalties(vocab_size, max_rows, device)
        self._bad_words = BadWords(vocab_size, device)
        self._processors = Processors()
        self._keepers = (self._penalties, self._bad_words, self._processors)

    def join(self, rows: Iterable[JoinedRow]) -> None:
        """Forget what the rows' former requests asked for; keep what the new ones do."""
        for row in rows:
            self._rules.pop(row.row, None)
            self._broken.pop(row.row, None)
            for keeper in self._keepers:
                keeper.drop(row.row)
            if row.params.shapes_logits:
                self._take_up(row)

    def _take_up(self, row: JoinedRow) -> None:
        """Keep what a row asks for. What goes wrong ends its request, in place of a token."""
        try:
            self._rules[row.row] = self._rule(row)
            for keeper in self._keepers:
                keeper.join(row)
        except Exception as error:
            _log.exception("the rules of request %d could not be taken up", row.request_id)
            self._broken[row.row] = describe_error(error)
            self._rules[row.row] = self._no_rule(row)
            for keeper in self._keepers:
                keeper.drop(row.row)

    def _no_rule(self, row: JoinedRow) -> _Rule:
        """For a row that fails whenever it is looked at."""
        none = self._ids(())
        return _Rule(
            allowed=None,
            bias_ids=none,
            bias=none.float(),
            stops=none,
            min_tokens=0,
            request_id=row.request_id,
            lasts=True,
        )

    def shaped(self, rows: Which, num_generated: Which) -> IntArray:
        """Which of the rows, by place, have a rule that still says anything."""
        found = [
            place
            for place, (row, generated) in enumerate(
                zip(rows.tolist(), num_generated.tolist(), strict=True)
            )
            if row in self._rules and self._rules[row].applies(generated)
        ]
        return np.array(found, np.int32)

    def bound(self, rows: Which) -> BoolArray:
        """(n,) which of the rows have a rule, whether it says anything now or later."""
        return np.array([row in self._rules for row in rows.tolist()], np.bool_)

    def shape(self, logits_NV: Tensor, rows: Which, num_generated: Which) -> Mapping[int, str]:
        """Change float32 logits in place. Every one of the rows has a rule.

        Returns:
            Why rows failed, by place: their logits mean nothing.
        """
        failures: dict[int, str] = {}
        numbers = zip(rows.tolist(), num_generated.tolist(), strict=True)
        for place, (row, generated) in enumerate(numbers):
            if row in self._broken:
                failures[place] = self._broken[row]
                continue
            rule = self._rules[row]
            try:
                fault("sampler.row", rule.request_id)
                self._apply(logits_NV[place], rule, generated)
                self._bad_words.apply(logits_NV[place], row)
            except Exception as error:
                _log.exception("the rules of request %d failed", rule.request_id)
                failures[place] = describe_error(error)
        failures |= self._processors.apply(logits_NV, rows)
        self._penalties.apply(logits_NV, rows)
        return failures

    def update(self, rows: Which, token_ids_N: Tensor) -> None:
        """Count the tokens (n,) that the rows were given."""
        self._penalties.update(rows, token_ids_N)
        self._bad_words.update(rows, token_ids_N)
        self._processors.update(rows, token_ids_N)

    def _rule(self, row: JoinedRow) -> _Rule:
        params = row.params
        bias = {t: b for t, b in (params.logit_bias or {}).items() if t < self._vocab_size}
        return _Rule(
            allowed=self._ids(params.allowed_token_ids) if params.allowed_token_ids else None,
            bias_ids=self._ids(bias),
            bias=on_device(np.array([*bias.values()], np.float32), self._device),
            stops=self._ids(row.stop_token_ids),
            min_tokens=params.min_tokens,
            request_id=row.request_id,
            lasts=msgspec.structs.replace(params, min_tokens=0).shapes_logits,
        )

    def _ids(self, ids: Iterable[int]) -> Tensor:
        inside = [token for token in ids if token < self._vocab_size]
        return on_device(np.array(inside, np.int64), self._device)

    def _apply(self, x_V: Tensor, rule: _Rule, num_generated: int) -> None:
        if rule.allowed is not None:
            kept = x_V[rule.allowed]
            x_V.fill_(-torch.inf)[rule.allowed] = kept
        if len(rule.bias):
            x_V[rule.bias_ids] += rule.bias
        if num_generated < rule.min_tokens:
            x_V[rule.stops] = -torch.inf
