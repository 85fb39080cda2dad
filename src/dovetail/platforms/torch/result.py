"""What a step produced, on its way to the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch

from dovetail.core.batch import LogprobArrays, StepOutput
from dovetail.core.types import BoolArray, IntArray
from dovetail.platforms.torch.sampler import LogprobTensors, SampleResult
from dovetail.platforms.torch.transfers import Fetch, Fetched

__all__ = ["ChosenStep", "SampledStep"]

_Numbers: TypeAlias = tuple[IntArray, IntArray, BoolArray]
"""Tokens (S, W), how many of a row are valid, and whether its logits are finite."""
_NOBODY: _Numbers = np.zeros((0, 1), np.int32), np.zeros(0, np.int32), np.zeros(0, np.bool_)


class SampledStep:
    """Everything that a step may give. What is on the device is fetched in a few copies.

    Args:
        fetch: Brings tensors to the host.
        result: What was chosen; None if nothing was to be.
        prompt: Of the positions in ``Batch.prompt_logprobs``.
        drafts: As in ``StepOutput``.
    """

    def __init__(
        self,
        fetch: Fetch,
        result: SampleResult | None,
        prompt: LogprobTensors | None = None,
        drafts: IntArray | None = None,
    ) -> None:
        self._failures = {} if result is None else result.failures
        self._drafts = drafts
        self._numbers = None if result is None else _numbers(fetch, result)
        wanted = None if result is None else result.logprobs
        self._logprobs = None if wanted is None else _fetched(fetch, wanted)
        self._prompt = None if prompt is None else _fetched(fetch, prompt)

    def result(self) -> StepOutput:
        """See ``core.batch.StepOutput``."""
        token_ids, num_tokens, finite = _NOBODY if self._numbers is None else self._numbers()
        return StepOutput(
            token_ids=token_ids,
            num_tokens=num_tokens,
            finite=finite,
            drafts=self._drafts,
            failures=self._failures,
            logprobs=_arrays(self._logprobs),
            prompt_logprobs=_arrays(self._prompt),
        )


class ChosenStep:
    """One token for each row, and nothing else.

    Args:
        chosen: (N, 2) int32: tokens, and whether their rows are finite; padding comes last.
        count: S, how many are meant.
    """

    def __init__(self, chosen: Fetched, count: int) -> None:
        self._chosen = chosen
        self._count = count

    def result(self) -> StepOutput:
        """See ``core.batch.StepOutput``."""
        table = self._chosen.numpy()[: self._count]
        return StepOutput(
            token_ids=table[:, :1],
            num_tokens=np.ones(self._count, np.int32),
            finite=table[:, 1].astype(np.bool_),
        )


def _numbers(fetch: Fetch, result: SampleResult) -> Callable[[], _Numbers]:
    """What was chosen: from a device in one copy, on the host without any."""
    chosen, counts, finite = result.chosen, result.num_tokens, result.finite
    if chosen.is_cpu:
        return lambda: (
            chosen.numpy().astype(np.int32),
            counts.numpy().astype(np.int32),
            finite.numpy(),
        )
    columns = torch.cat((chosen, counts[:, None], finite[:, None]), 1)
    table = fetch(columns.to(torch.int32))

    def split() -> _Numbers:
        host = table.numpy()
        return host[:, :-2], host[:, -2], host[:, -1].astype(np.bool_)

    return split


_Columns = tuple[Fetched, Fetched, Fetched]


def _fetched(fetch: Fetch, tensors: LogprobTensors) -> _Columns:
    return (
        fetch(tensors.token_ids.to(torch.int32)),
        fetch(tensors.logprobs.float()),
        fetch(tensors.ranks.to(torch.int32)),
    )


def _arrays(columns: _Columns | None) -> LogprobArrays | None:
    if columns is None:
        return None
    ids, logprobs, ranks = (column.numpy() for column in columns)
    return LogprobArrays(token_ids=ids, logprobs=logprobs, ranks=ranks)
