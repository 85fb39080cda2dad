"""A small model beside the served one, which guesses what that will say.

It sees the same tokens, in KV blocks of the same numbers, and keeps a cache of its own. What it
proposes is its likeliest continuation. Prompts are computed with the served model's; rows that
decode while no drafts are wanted fall behind, and catch up when they are. Where the cache lacks a
prefix that such rows left to others, the guesses are worse and the answers the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dovetail.core.batch import Batch, SamplingBatch
from dovetail.core.contracts.model import StepInputs
from dovetail.core.contracts.runner import RunnerConfig
from dovetail.core.models.demand import attention_need, block_bytes
from dovetail.core.types import IntArray
from dovetail.platforms.torch.loading import RunnableModel, load_model
from dovetail.platforms.torch.planning import choose_backend
from dovetail.platforms.torch.platform import TorchPlatform
from dovetail.platforms.torch.sampler import SampleResult
from dovetail.platforms.torch.sampling.order import greedy

__all__ = ["DraftModel"]

Places = npt.NDArray[np.integer[Any]]

_NO_INDEX = np.zeros(0, np.intp)
_GREEDY = SamplingBatch.greedy(0)


class DraftModel:
    """Follows the steps of a runner and proposes tokens.

    Args:
        platform: As for the runner.
        config: The draft model's; blocks, rows and lengths are the runner's.
    """

    def __init__(self, platform: TorchPlatform, config: RunnerConfig) -> None:
        self._platform = platform
        self._config = config
        self._caches: list[Any] = []
        rows = config.max_num_seqs
        self._tokens = np.zeros((rows, config.max_model_len), np.int32)
        self._length = np.zeros(rows, np.int32)
        """Known tokens of each row; 0 until its first step."""
        self._computed = np.zeros(rows, np.int32)
        """How many of them have keys and values in this model's cache."""
        self._guessed = np.zeros(rows, np.int32)
        """How many would have, if the latest drafts are right."""

    def load(self) -> Iterator[tuple[int, int]]:
        """Read the weights and choose the attention backend."""
        model: RunnableModel = yield from load_model(self._platform, self._config)
        self._need = attention_need(self._config, model.attention_specs)
        self._attention = choose_backend(self._platform, self._config, self._need).backend
        model.bind_attention(self._attention)
        self._model = model

    @property
    def bytes_per_block(self) -> int:
        """What a block costs beside the served model's."""
        return block_bytes(self._attention, self._need)

    @property
    def window(self) -> int | None:
        """As ``AttentionNeed.window``."""
        return self._need.window

    def allocate(self, num_blocks: int) -> None:
        """Make every layer's cache."""
        self._caches = [
            self._attention.allocate(spec, self._need, num_blocks) for spec in self._need.specs
        ]

    def copy_blocks(self, pairs: IntArray) -> None:
        """Copy whole blocks, as in the served model's cache."""
        self._caches = list(self._attention.copy_blocks(self._caches, pairs))

    def step(self, batch: Batch, result: SampleResult | None) -> IntArray | None:
        """Take in a step, and propose what comes next. Waits for what was chosen.

        Args:
            batch: The step.
            result: What was chosen; None if nothing was.

        Returns:
            Proposals (S, k), -1 from where there is none; None if none are wanted.
        """
        num_drafts = np.zeros(batch.num_rows, np.int32)
        if batch.num_drafts is not None:
            num_drafts[batch.sampled] = batch.num_drafts
        known = batch.sequence_lens - num_drafts
        self._note(batch, known, result)
        target = np.where(batch.query_lens - num_drafts > 1, known, 0)
        wanted = batch.num_drafts_wanted
        if wanted is not None:
            asks = batch.sampled[wanted > 0]
            target[asks] = self._length[batch.rows[asks]]
        which = np.flatnonzero(target > self._computed[batch.rows])
        hidden = self._compute(batch, which, target[which])
        if wanted is None or not len(asks):
            return None
        return self._propose(batch, wanted, hidden[np.searchsorted(which, asks)])

    def _note(self, batch: Batch, known: IntArray, result: SampleResult | None) -> None:
        """Keep the tokens of the rows, and see how far the cache agrees with them.

        ``known`` is (R,): the tokens of each row before those that were chosen.
        """
        for joined in batch.joined:
            self._tokens[joined.row, : len(joined.token_ids)] = joined.token_ids
            self._length[joined.row] = self._guessed[joined.row] = 0
        rows = batch.rows
        first = self._length[rows] == 0
        self._computed[rows[first]] = batch.context_lens[first]
        self._length[rows] = known
        if result is None:
            return
        chosen = result.chosen.to("cpu", torch.int32).numpy()
        counts = result.num_tokens.to("cpu", torch.int32).numpy()
        rows = rows[batch.sampled]
        places = np.arange(chosen.shape[1])
        valid = places < counts[:, None]
        positions = known[batch.sampled][:, None] + places
        self._tokens[rows.repeat(counts), positions[valid]] = chosen[valid]
        self._length[rows] += counts
        agreed = np.minimum(self._guessed[rows], self._length[rows] - 1)
        self._computed[rows] = np.maximum(self._computed[rows], agreed)
        self._guessed[rows] = 0

    def _propose(self, batch: Batch, wanted: IntArray, last: Tensor) -> IntArray:
        """Continue rows by their likeliest tokens, from their last hidden states (n, D)."""
        drafts = np.full((len(wanted), int(wanted.max())), -1, np.int32)
        active = np.flatnonzero(wanted > 0)
        rows = batch.rows[batch.sampled]
        for number in range(drafts.shape[1]):
            token_ids = greedy(self._model.logits(last))[0].to("cpu", torch.int32).numpy()
            drafts[active, number] = token_ids
            goes_on = wanted[active] > number + 1
            active = active[goes_on]
            if not len(active):
                break
            start = self._length[rows[active]] + number
            last = self._forward(batch, batch.sampled[active], start, start + 1, token_ids[goes_on])
        self._guessed[rows] = self._length[rows] + wanted - 1
        return drafts

    def _compute(self, batch: Batch, which: Places, ends: IntArray) -> Tensor:
        """Bring the cache of rows ``which`` of the batch up to ``ends``, both (n,).

        As many tokens at a time as a step may have.

        Returns:
            The hidden state of the last token of each, (n, D).
        """
        budget = self._config.max_num_batched_tokens
        hidden: list[Tensor] = []
        group: list[tuple[int, int, int]] = []
        room = budget
        for i, end in zip(which.tolist(), ends.tolist(), strict=True):
            row = int(batch.rows[i])
            start, self._computed[row] = int(self._computed[row]), end
            while end - start > budget:
                self._run(batch, [(i, start, start + budget)])
                start += budget
            if end - start > room:
                hidden.append(self._run(batch, group))
                group, room = [], budget
            group.append((i, start, end))
            room -= end - start
        if group:
            hidden.append(self._run(batch, group))
        return torch.cat(hidden) if hidden else torch.empty(0)

    def _run(self, batch: Batch, parts: list[tuple[int, int, int]]) -> Tensor:
        """Compute (row of the batch, from, to) and return the last hidden state of each."""
        which, starts, ends = (np.array(column, np.int32) for column in zip(*parts, strict=True))
        tokens = [self._tokens[batch.rows[i], start:end] for i, start, end in parts]
        return self._forward(batch, which, starts, ends, np.concatenate(tokens))

    def _forward(
        self, batch: Batch, which: Places, starts: IntArray, ends: IntArray, tokens: IntArray
    ) -> Tensor:
        """Hidden states (n, D) of the last tokens of some rows, whose (T,) tokens are computed."""
        step = Batch(
            step=batch.step,
            rows=batch.rows[which],
            query_lens=ends - starts,
            context_lens=starts,
            block_tables=batch.block_tables[which],
            token_ids=tokens.astype(np.int32),
            carried=_NO_INDEX,
            carried_rows=_NO_INDEX,
            sampled=np.arange(len(which)),
            sampling=_GREEDY,
            copies=np.zeros((0, 2), np.int32),
        )
        inputs = StepInputs(
            token_ids_T=self._tensor(step.token_ids),
            positions_T=self._tensor(self._model.positions(step.positions)),
            plan=self._attention.plan(step, self._need),
        )
        hidden, self._caches = self._model.forward(inputs, self._caches)
        return hidden[self._tensor(step.last_token_index)]

    def _tensor(self, array: IntArray) -> Tensor:
        return torch.from_numpy(array).to(self._platform.device, torch.long)
