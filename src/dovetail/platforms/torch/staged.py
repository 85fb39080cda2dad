"""Steps for a device with a queue: fed in one copy, ahead of its work, recorded where they recur.

All that a step brings lies in one piece of the device's memory (``Uploads``). A step in which
every row decodes is padded to one of a few numbers of rows and replayed: from token numbers to
token numbers, nothing of it passes through Python again. The choice of tokens is a record of its
own, in three kinds, for greedy rows need less. Any other step runs the same functions op by op.
Neither waits for the device, which takes the tokens of the step before from its own memory; what
comes back is a table of token numbers, copied behind the step.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch, SamplingBatch
from dovetail.core.buckets import StepShape, pad_to, padded
from dovetail.core.contracts.attention import RecordableAttention
from dovetail.core.contracts.model import StepInputs
from dovetail.core.contracts.observation import Wrap
from dovetail.core.contracts.runner import Pending
from dovetail.core.shapes import rehearsal
from dovetail.platforms.torch.queue import DeviceQueue
from dovetail.platforms.torch.result import ChosenStep, SampledStep, packed
from dovetail.platforms.torch.sampler import SampleResult
from dovetail.platforms.torch.sampling.weights import Controls
from dovetail.platforms.torch.steps import Loaded, StepBase
from dovetail.platforms.torch.transfers import Uploads, fetcher

__all__ = ["StagedSteps", "recorded_sizes"]


def recorded_sizes(most: int) -> tuple[int, ...]:
    """Numbers of rows, ascending, up to ``most``: the larger, the less that padding costs."""
    few = [size for size in (1, 2, 4) if size < most]
    steps = [*range(8, 64, 8), *range(64, 256, 16), *range(256, most, 32)]
    return (*few, *(size for size in steps if size < most), most)


@dataclass(frozen=True)
class _Staged:
    """What a step brings, on the device; C tokens are chosen."""

    token_ids: Tensor
    """(T,) int32"""
    carried: Tensor
    """(T,) int32: the row whose last token stands here in place of ``token_ids``; -1: none."""
    positions: Tensor
    """(T,) int32, as the model counts them."""
    index: Tensor | None
    """(C,) int32: the tokens that get a successor; None: all, in order."""
    rows: Tensor
    """(C,) int32: where the successor is kept."""
    controls: Controls
    """How it is chosen."""
    plan: object
    """The attention backend's."""


class StagedSteps(StepBase):
    """See the module.

    Args:
        loaded: Its attention backend is a ``RecordableAttention``, its shapes are free.
        caches: One per layer; changed in place by every step.
        queue: The device's.
        records: Whether steps are recorded at all.
    """

    def __init__(
        self, loaded: Loaded, caches: list[Any], queue: DeviceQueue, *, records: bool
    ) -> None:
        super().__init__(loaded, caches, loaded.platform.device)
        if not isinstance(loaded.attention, RecordableAttention):
            raise TypeError(f"attention backend {loaded.attention.name} cannot be recorded")
        self._attention: RecordableAttention = loaded.attention
        self._queue, self._fetch = queue, fetcher(queue)
        config, device = loaded.config, loaded.platform.device
        self._nobody = config.max_num_seqs
        """The place behind all rows in ``last_token``."""
        self._sizes = recorded_sizes(config.max_num_seqs) if records else ()
        self._records: dict[int, _Record] = {}
        self._largest = pad_to(
            rehearsal(0, 2, 1),
            StepShape(
                config.max_num_batched_tokens,
                min(config.max_num_seqs, config.max_num_batched_tokens - 1),
                -(-config.max_model_len // config.block_size),
            ),
        )
        self._uploads = Uploads(queue, device, self._most_numbers())
        self._chosen = torch.zeros(config.max_num_seqs, 2, dtype=torch.int32, device=device)
        """``packed`` tokens of the last replay."""

    def _most_numbers(self) -> int:
        """What the largest step brings, if all its rows check as many drafts as there may be."""
        config, step = self.loaded.config, self._largest
        longest = replace(step, context_lens=config.max_model_len - step.query_lens)
        brought = self._brought(longest, config.max_num_seqs * (1 + config.max_drafts))
        return Uploads.size(brought)

    def rehearsals(self, *, record: bool) -> Iterator[tuple[str, Callable[[], object]]]:
        """Short steps and the largest one, then every number of rows that is recorded."""
        for name, batch in (*self.loaded.shapes.rehearsals(), ("largest step", self._largest)):
            yield name, partial(self._rehearse, batch)
        # Largest first, so that the smaller ones find memory that was taken for it.
        for size in reversed(self._sizes):
            step = pad_to(rehearsal(0, 1, 1), StepShape(size, size, 1))
            work = self._record if record else self._decode
            yield f"{size} rows", partial(work, step)

    def _rehearse(self, batch: Batch) -> None:
        self.start(batch).result()

    def _decode(self, step: Batch) -> tuple[_Staged, Tensor]:
        """A padded step in which every row gets a token; also the hidden states (R, D)."""
        staged = replace(self._send(step, step.num_rows), index=None)
        hidden = self._hidden_of(staged)
        for kind in _KINDS:
            self._choose(staged, hidden, kind)
        return staged, hidden

    def _record(self, step: Batch) -> None:
        staged, hidden = self._decode(step)
        size = step.num_rows
        largest = self._records.get(self._sizes[-1])
        kept = hidden if largest is None else largest.hidden[:size]

        def forward() -> None:
            kept.copy_(self._hidden_of(staged))

        def choose(kind: _Kind) -> None:
            self._chosen[:size] = packed(*self._choose(staged, kept, kind))

        self._records[size] = _Record(
            forward=self._queue.record(forward),
            choose={kind: self._queue.record(partial(choose, kind)) for kind in _KINDS},
            hidden=kept,
            staged=staged,
        )

    @contextmanager
    def wrap_sampling(self, wrap: Wrap) -> Iterator[None]:
        """See ``Steps``."""
        records, self._records = self._records, {}
        try:
            with super().wrap_sampling(wrap):
                yield
        finally:
            self._records = records

    def start(self, batch: Batch) -> Pending:
        """See ``Steps``."""
        self.begin(batch)
        record = self._record_for(batch)
        if record is None:
            staged = self._send(batch, len(batch.logit_index))
            hidden = self._hidden_of(staged)
            of_places = hidden if staged.index is None else hidden[staged.index]
            return self._finish(batch, of_places, staged, hidden)
        size = len(record.hidden)
        padded = pad_to(batch, StepShape(size, size, batch.block_tables.shape[1]))
        self._uploads.send(self._brought(padded, size))
        record.forward()
        if _is_simple(batch) and self.loaded.draft is None:
            record.choose[_kind(batch.sampling)]()
            return ChosenStep(self._fetch(self._chosen[:size]), batch.num_rows)
        return self._finish(batch, record.hidden[: batch.num_rows])

    def _record_for(self, batch: Batch) -> _Record | None:
        """The record that serves a step, if one does: every row decodes and gets a token."""
        count = batch.num_rows
        if not self._records or not count == batch.num_tokens == len(batch.sampled):
            return None
        return self._records[self._sizes[bisect_left(self._sizes, count)]]

    def _finish(
        self,
        batch: Batch,
        hidden_CD: Tensor,
        staged: _Staged | None = None,
        hidden_TD: Tensor | None = None,
    ) -> Pending:
        """Choose tokens, op by op."""
        draft, need = self.loaded.draft, batch.prompt_logprobs
        result = drafts = prompt = None
        if staged is not None and _is_simple(batch):
            tokens, finite = self._choose(staged, hidden_CD, _kind(batch.sampling))
            if draft is None and need is None:
                return ChosenStep(self._fetch(packed(tokens, finite)), len(tokens))
            ones = torch.ones_like(tokens)
            result = SampleResult(chosen=tokens[:, None], num_tokens=ones, finite=finite)
        elif len(batch.sampled):
            result = self.sample(self.loaded.model.logits(hidden_CD), batch)
            self.last_token[self.on_device(batch.rows[batch.sampled])] = result.token_ids
        if draft is not None:
            drafts = draft.step(batch, result)
        if need is not None and hidden_TD is not None:
            prompt = self.prompt_logprobs(hidden_TD, batch, need)
        return SampledStep(self._fetch, result, prompt, drafts)

    def _hidden_of(self, staged: _Staged) -> Tensor:
        """(T, D)"""
        said = self.last_token[staged.carried.clamp(min=0)]
        inputs = StepInputs(
            token_ids_T=torch.where(staged.carried >= 0, said, staged.token_ids.long()),
            positions_T=staged.positions.long(),
            plan=staged.plan,
        )
        hidden, self.caches = self.loaded.model.forward(inputs, self.caches)
        return hidden

    def _choose(self, staged: _Staged, hidden_CD: Tensor, kind: _Kind) -> tuple[Tensor, Tensor]:
        """Tokens (C,) and whether their rows are finite (C,); the tokens are kept for the rows."""
        logits = self.loaded.model.logits(hidden_CD)
        controls = None if kind.greedy else staged.controls
        tokens, finite = self.choose(logits, controls, restricts=kind.restricts)
        self.last_token[staged.rows] = tokens
        return tokens, finite

    def _send(self, step: Batch, num_places: int) -> _Staged:
        """Give the device what a step brings."""
        brought = self._brought(step, num_places)
        self._uploads.send(brought)
        tokens, carried, positions, index, rows, controls, *plan = self._uploads.views(brought)
        return _Staged(
            token_ids=tokens,
            carried=carried,
            positions=positions,
            index=index,
            rows=rows,
            controls=Controls.unpack(controls),
            plan=self._attention.device_plan(plan, step, self.loaded.need),
        )

    def _brought(self, step: Batch, num_places: int) -> tuple[np.ndarray[Any, Any], ...]:
        """What a step brings, in the order of ``_Staged``, for so many tokens to be chosen."""
        carried = np.full(step.num_tokens, -1, np.int32)
        carried[step.carried] = step.carried_rows
        rows = np.full(num_places, self._nobody, np.int32)
        if step.num_drafts is None:
            rows[: len(step.sampled)] = step.rows[step.sampled]
        return (
            step.token_ids,
            carried,
            self.loaded.model.positions(step.positions),
            padded(step.logit_index, num_places),
            rows,
            Controls.pack(step.sampling, num_places),
            *self._attention.host_plan(step, self.loaded.need),
        )

    def describe(self) -> str:
        """What is recorded."""
        if not self._sizes:
            return "none: option graphs is off"
        return f"decode steps of up to {self._sizes[-1]} rows, in {len(self._sizes)} sizes"


class _Kind(NamedTuple):
    """What the rows of a step ask of the choice: the less, the cheaper it is."""

    greedy: bool
    """All of them are."""
    restricts: bool
    """Some that draw have top_k, top_p or min_p."""


_KINDS = (_Kind(True, False), _Kind(False, False), _Kind(False, True))


def _kind(sampling: SamplingBatch) -> _Kind:
    return _Kind(sampling.all_greedy, sampling.restricts and not sampling.all_greedy)


class _Record(NamedTuple):
    """A decode step of some number of rows, ready to be repeated."""

    forward: Callable[[], None]
    """Up to the hidden states."""
    choose: Mapping[_Kind, Callable[[], None]]
    """From there to the tokens."""
    hidden: Tensor
    """(rows, D) after the last norm, of the last replay of any size."""
    staged: _Staged
    """Its plan holds memory that the replay reads."""


def _is_simple(batch: Batch) -> bool:
    """Whether tokens are chosen by their rows' controls alone, one for each row, and no more."""
    sampling = batch.sampling
    rules = sampling.shapes_logits or sampling.masks is not None
    return not rules and sampling.num_logprobs is None and batch.num_drafts is None
