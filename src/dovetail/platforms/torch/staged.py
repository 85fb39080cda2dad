"""Steps for a device with a queue: fed in one copy, ahead of its work, recorded where they recur.

All that a step brings lies in one piece of the device's memory (``Uploads``). Steps are padded to
one of a few sizes (``records``) and replayed: from token numbers to token numbers, nothing of them
passes through Python again. Where every row decodes, sizes are numbers of rows; other steps have so
many tokens in so many rows. Those that no record serves run the same functions op by op. The choice
of tokens is a record of its own, in three kinds, for greedy rows need less. Nothing waits for the
device, which takes the tokens of the step before from its own memory; what comes back is a table of
token numbers, copied behind the step.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple, TypeAlias

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
from dovetail.platforms.torch.records import ALWAYS, is_served, recorded_shapes, recorded_sizes
from dovetail.platforms.torch.result import ChosenStep, SampledStep
from dovetail.platforms.torch.sampling.weights import Controls
from dovetail.platforms.torch.steps import Loaded, StepBase
from dovetail.platforms.torch.transfers import Uploads, fetcher

__all__ = ["StagedSteps"]


@dataclass(frozen=True, kw_only=True)
class _Staged:
    """What a step brings, on the device; C tokens are chosen."""

    rows: Tensor
    """(C,) int64: where the successor is kept."""
    controls: Controls
    """How it is chosen."""
    sources: Tensor
    """(T,) int32: where in ``Uploads.memory`` each token is: among what the step brought, or where
    the last token of a row is kept."""
    positions: Tensor
    """(T,) int32, as the model counts them."""
    index: Tensor
    """(C,) int32: the tokens that get a successor."""
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
        self._shapes: tuple[tuple[int, int], ...] = ()
        if records and self._attention.records_mixed:
            self._shapes = recorded_shapes(config.max_num_batched_tokens, config.max_num_seqs)
        self._even = ALWAYS
        """See ``is_served``."""
        self._forwards: dict[tuple[int, int], Callable[[], None]] = {}
        """By numbers of tokens and rows, up to the hidden states."""
        self._choices: dict[int, Mapping[_Kind, Callable[[], None]]] = {}
        """By number of rows, from there to the tokens."""
        self._held: list[_Staged] = []
        """Of the steps that were recorded: their plans hold memory that replays read."""
        self._hidden, self._last = torch.empty(0), torch.empty(0)
        """(tokens, D) and (rows, D) after the last norm, of the last replay: of all tokens, unless
        it was of rows that decode, and of those that get a successor."""
        self._largest = pad_to(
            rehearsal(0, 2, 1),
            StepShape(
                config.max_num_batched_tokens,
                min(config.max_num_seqs, config.max_num_batched_tokens - 1),
                -(-config.max_model_len // config.block_size),
            ),
        )
        self._uploads = Uploads(queue, device, self._most_numbers(), kept=len(self.last_token))
        self.last_token = self._uploads.kept
        self._chosen = torch.zeros(config.max_num_seqs, 2, dtype=torch.int32, device=device)
        """(max_num_seqs, 2): what the last replay chose, and whether its rows are finite."""

    def _most_numbers(self) -> int:
        """What the largest step brings, if all its rows check as many drafts as there may be."""
        config, step = self.loaded.config, self._largest
        longest = replace(step, context_lens=config.max_model_len - step.query_lens)
        brought = self._brought(longest, config.max_num_seqs * (1 + config.max_drafts))
        return Uploads.size(brought)

    def rehearsals(self, *, record: bool) -> Iterator[tuple[str, Callable[[], object]]]:
        """Short steps and the largest one, then everything that is recorded."""
        for name, batch in (*self.loaded.shapes.rehearsals(), ("largest step", self._largest)):
            yield name, partial(self._rehearse, batch)
        keep = self._queue.record if record else _once
        if record and self._shapes and self._shapes[-1][0] > ALWAYS:
            yield "largest step again", self._compare
        # Largest first, so that the smaller ones find memory that was taken for it.
        for tokens, rows in reversed(self._shapes):
            yield f"{tokens} tokens, {rows} rows", partial(self._record, tokens, rows, keep)
        for size in reversed(self._sizes):
            yield f"{size} rows", partial(self._record, size, size, keep)

    def _rehearse(self, batch: Batch) -> None:
        self.start(batch).result()

    def _compare(self) -> None:
        """Host and device over the largest step op by op: how long it takes to give, and to do."""
        begin = time.perf_counter()
        pending = self.start(self._largest)
        given = time.perf_counter()
        pending.result()
        share = (given - begin) / (time.perf_counter() - begin)
        self._even = max(ALWAYS, int(share * self._largest.num_tokens))

    def _record(self, tokens: int, rows: int, keep: _Keep) -> None:
        """Of one token in one row, all others padding: what is launched serves any step.

        Sizes that would serve none but steps just as long are left out, except the largest.
        """
        if tokens > self._even and tokens < self._largest.num_tokens:
            return
        step = pad_to(rehearsal(0, 1, 1), StepShape(tokens, rows, 1))
        staged = self._send(step, rows)
        if not self._last.numel():
            self._make_room(self._hidden_of(staged))
        self._held.append(staged)
        self._forwards[tokens, rows] = keep(partial(self._run, staged))
        if tokens == rows:
            self._choices[rows] = {
                kind: keep(partial(self._choose_last, staged, kind)) for kind in _KINDS
            }

    def _make_room(self, hidden_TD: Tensor) -> None:
        most = max((tokens for tokens, _ in self._shapes), default=0)
        self._hidden = hidden_TD.new_zeros(most, hidden_TD.shape[1])
        self._last = hidden_TD.new_zeros(self._sizes[-1], hidden_TD.shape[1])

    def _run(self, staged: _Staged) -> None:
        """Up to the hidden states, which are kept."""
        tokens, rows = len(staged.sources), len(staged.rows)
        hidden = self._hidden_of(staged)
        if tokens == rows:
            self._last[:rows] = hidden
            return
        self._hidden[:tokens] = hidden
        torch.index_select(hidden, 0, staged.index, out=self._last[:rows])

    def _choose_last(self, staged: _Staged, kind: _Kind) -> None:
        """From the hidden states that were kept to ``_chosen``."""
        rows = len(staged.rows)
        self._choose(staged, self._last[:rows], kind, self._chosen[:rows])

    @contextmanager
    def wrap_sampling(self, wrap: Wrap) -> Iterator[None]:
        """See ``Steps``."""
        kept = self._forwards, self._choices
        self._forwards, self._choices = {}, {}
        try:
            with super().wrap_sampling(wrap):
                yield
        finally:
            self._forwards, self._choices = kept

    def start(self, batch: Batch) -> Pending:
        """See ``Steps``."""
        self.begin(batch)
        simple = self.loaded.draft is None and batch.prompt_logprobs is None and _is_simple(batch)
        shape = self._shape_of(batch)
        if shape is not None:
            return self._replay(batch, *shape, simple=simple)
        if not simple or not self._choices:
            staged = self._send(batch, len(batch.logit_index))
            hidden = self._hidden_of(staged)
            of_places = hidden.index_select(0, staged.index)
            return self._finish(batch, of_places, hidden, staged if simple else None)
        rows = _fitting(self._sizes, len(batch.sampled))
        staged = self._send(batch, rows)
        torch.index_select(self._hidden_of(staged), 0, staged.index, out=self._last[:rows])
        return self._replay_choice(batch, rows)

    def _shape_of(self, batch: Batch) -> tuple[int, int] | None:
        """Tokens and rows of the record that serves a step, if one does."""
        count = batch.num_rows
        if not self._forwards:
            return None
        if count == batch.num_tokens == len(batch.sampled):
            rows = _fitting(self._sizes, count)
            return rows, rows
        for shape in self._shapes:
            if shape[0] >= batch.num_tokens and shape[1] >= count and shape in self._forwards:
                return shape if is_served(batch.num_tokens, shape[0], self._even) else None
        return None

    def _replay(self, batch: Batch, tokens: int, rows: int, *, simple: bool) -> Pending:
        step = pad_to(batch, StepShape(tokens, rows, batch.block_tables.shape[1]))
        self._uploads.send(self._brought(step if simple else _without_choice(step), rows))
        self._forwards[tokens, rows]()
        if simple:
            return self._replay_choice(batch, rows)
        if tokens == rows:
            hidden = self._last[: batch.num_rows]
            return self._finish(batch, hidden, hidden)
        hidden = self._hidden[: batch.num_tokens]
        return self._finish(batch, hidden[self.on_device(batch.logit_index)], hidden)

    def _replay_choice(self, batch: Batch, rows: int) -> Pending:
        self._choices[rows][_kind(batch.sampling)]()
        return ChosenStep(self._fetch(self._chosen[:rows]), len(batch.sampled))

    def _finish(
        self, batch: Batch, hidden_CD: Tensor, hidden_TD: Tensor, staged: _Staged | None = None
    ) -> Pending:
        """Choose tokens, op by op: by the controls that were ``staged``, else by all the rules."""
        if staged is not None:
            chosen = self._chosen.new_empty(len(staged.rows), 2)
            self._choose(staged, hidden_CD, _kind(batch.sampling), chosen)
            return ChosenStep(self._fetch(chosen), len(chosen))
        draft, need = self.loaded.draft, batch.prompt_logprobs
        result = drafts = prompt = None
        if len(batch.sampled):
            result = self.sample(self.loaded.model.logits(hidden_CD), batch)
            rows = self.on_device(batch.rows[batch.sampled])
            self.last_token[rows] = result.token_ids.to(self.last_token.dtype)
        if draft is not None:
            drafts = draft.step(batch, result)
        if need is not None:
            prompt = self.prompt_logprobs(hidden_TD, batch, need)
        return SampledStep(self._fetch, result, prompt, drafts)

    def _hidden_of(self, staged: _Staged) -> Tensor:
        """(T, D)"""
        inputs = StepInputs(
            token_ids_T=self._uploads.memory.index_select(0, staged.sources),
            positions_T=staged.positions,
            plan=staged.plan,
        )
        hidden, self.caches = self.loaded.model.forward(inputs, self.caches)
        return hidden

    def _choose(self, staged: _Staged, hidden_CD: Tensor, kind: _Kind, chosen_C2: Tensor) -> None:
        """Tokens and whether their rows are finite; the tokens are kept for the rows."""
        logits = self.loaded.model.logits(hidden_CD)
        controls = None if kind.greedy else staged.controls
        tokens, finite = self.choose(logits, controls, restricts=kind.restricts)
        chosen_C2[:, 0], chosen_C2[:, 1] = tokens, finite
        self.last_token[staged.rows] = chosen_C2[:, 0]

    def _send(self, step: Batch, num_places: int) -> _Staged:
        """Give the device what a step brings."""
        brought = self._brought(step, num_places)
        self._uploads.send(brought)
        rows, controls, _tokens, sources, positions, index, *plan = self._uploads.views(brought)
        return _Staged(
            rows=rows,
            controls=Controls.unpack(controls),
            sources=sources,
            positions=positions,
            index=index,
            plan=self._attention.device_plan(plan, step, self.loaded.need),
        )

    def _brought(self, step: Batch, num_places: int) -> tuple[np.ndarray[Any, Any], ...]:
        """What a step brings, in the order of ``_Staged``, for so many tokens to be chosen.

        Where what the choice reads lies depends on their number alone: it is recorded by that.
        Token ids lie between that and the rest.
        """
        rows = np.full(num_places, self._nobody, np.int64)
        if step.num_drafts is None:
            rows[: len(step.sampled)] = step.rows[step.sampled]
        of_choice = rows, Controls.pack(step.sampling, num_places)
        first = Uploads.place(self._nobody + 1, of_choice)
        sources = np.arange(first, first + step.num_tokens, dtype=np.int32)
        sources[step.carried] = step.carried_rows
        return (
            *of_choice,
            step.token_ids,
            sources,
            self.loaded.model.positions(step.positions),
            padded(step.logit_index, num_places),
            *self._attention.host_plan(step, self.loaded.need),
        )

    def describe(self) -> str:
        """What is recorded."""
        if not self._sizes:
            return "none: option graphs is off"
        decode = f"decode steps of up to {self._sizes[-1]} rows, in {len(self._sizes)} sizes"
        if not self._shapes:
            name = self.loaded.attention.name
            return f"{decode}; no others: attention backend {name} cannot record them"
        mixed = [shape for shape in self._shapes if shape in self._forwards] or self._shapes
        return f"{decode}; others of up to {mixed[-1][0]} tokens, in {len(mixed)}"


class _Kind(NamedTuple):
    """What the rows of a step ask of the choice: the less, the cheaper it is."""

    greedy: bool
    """All of them are."""
    restricts: bool
    """Some that draw have top_k, top_p or min_p."""


_KINDS = (_Kind(True, False), _Kind(False, False), _Kind(False, True))


def _kind(sampling: SamplingBatch) -> _Kind:
    return _Kind(sampling.all_greedy, sampling.restricts and not sampling.all_greedy)


_Keep: TypeAlias = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs some work and returns what repeats it."""


def _once(work: Callable[[], None]) -> Callable[[], None]:
    work()
    return work


def _fitting(sizes: Sequence[int], least: int) -> int:
    return sizes[bisect_left(sizes, least)]


def _without_choice(step: Batch) -> Batch:
    """The step, of which no token gets a successor."""
    none = SamplingBatch.greedy(0)
    return replace(step, sampled=step.sampled[:0], num_drafts=None, sampling=none)


def _is_simple(batch: Batch) -> bool:
    """Whether tokens are chosen by their rows' controls alone, one for each row, and no more."""
    sampling = batch.sampling
    rules = sampling.shapes_logits or sampling.masks is not None
    return not rules and sampling.num_logprobs is None and batch.num_drafts is None
