"""Steps of a loaded model, one after the other as they come."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch, PromptLogprobNeed
from dovetail.core.contracts.attention import AttentionBackend, AttentionNeed
from dovetail.core.contracts.model import StepInputs
from dovetail.core.contracts.observation import SAMPLING, Wrap
from dovetail.core.contracts.runner import Pending, RunnerConfig
from dovetail.core.shapes import Shapes
from dovetail.core.types import IndexArray, IntArray
from dovetail.platforms.torch.draft import DraftModel
from dovetail.platforms.torch.loading import RunnableModel
from dovetail.platforms.torch.planning import LOGIT_ROWS
from dovetail.platforms.torch.platform import TorchPlatform
from dovetail.platforms.torch.result import SampledStep
from dovetail.platforms.torch.sampler import LogprobTensors, Sampler
from dovetail.platforms.torch.sampling.choice import choose
from dovetail.platforms.torch.transfers import fetch_later

__all__ = ["DirectSteps", "Loaded", "Steps"]

_SPARED = 64
"""Tokens that are worth leaving out of the last layer."""


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What steps are run with."""

    platform: TorchPlatform
    config: RunnerConfig
    model: RunnableModel
    attention: AttentionBackend
    need: AttentionNeed
    shapes: Shapes
    draft: DraftModel | None


class Steps(Protocol):
    """One way to run them."""

    def rehearsals(self, *, record: bool) -> Iterator[tuple[str, Callable[[], object]]]:
        """What a warm-up does, by name.

        Args:
            record: Whether steps that recur are recorded; else they are run like others.
        """
        ...

    def start(self, batch: Batch) -> Pending:
        """Start a step."""
        ...

    def wrap_sampling(self, wrap: Wrap) -> AbstractContextManager[None]:
        """See ``ObservableRunner.wrap_ops``; of the choice of tokens. Nothing is replayed."""
        ...

    def describe(self) -> str | None:
        """What the user should know of it; None if nothing."""
        ...


class StepBase:
    """The parts that all ways share.

    Args:
        loaded: Model, attention and what they were made for.
        caches: One per layer; changed by every step.
        device: Where tokens are chosen.
    """

    def __init__(self, loaded: Loaded, caches: list[Any], device: torch.device) -> None:
        self.loaded = loaded
        self.caches = caches
        rows = loaded.config.max_num_seqs
        on_device = device == loaded.platform.device
        self.sampler = Sampler(
            loaded.model.vocab_size,
            rows,
            device,
            loaded.platform.choose_rows if on_device else choose,
        )
        self.last_token = torch.zeros(rows + 1, dtype=torch.long, device=device)
        """What each row said last; behind them, what nobody said."""
        self.sample = self.sampler.sample
        self.choose = loaded.platform.choose

    @contextmanager
    def wrap_sampling(self, wrap: Wrap) -> Iterator[None]:
        """See ``Steps``."""
        sample, choose = self.sample, self.choose
        self.sample, self.choose = wrap(SAMPLING, sample), wrap(SAMPLING, choose)
        try:
            yield
        finally:
            self.sample, self.choose = sample, choose

    def begin(self, batch: Batch) -> None:
        """What comes before the model: rows are taken over, blocks copied."""
        self.sampler.join(batch.joined)
        loaded = self.loaded
        for pairs in loaded.shapes.copies(batch.copies):
            self.caches = list(loaded.attention.copy_blocks(self.caches, pairs))
            if loaded.draft is not None:
                loaded.draft.copy_blocks(pairs)

    def prompt_logprobs(
        self, hidden_TD: Tensor, step: Batch, need: PromptLogprobNeed
    ) -> LogprobTensors:
        """Of known tokens, a bounded number of them at a time."""
        targets, done = self.at_sampler(need.target), 0
        parts = []
        for logits, count in self.logit_parts(hidden_TD, step, need.token_index, LOGIT_ROWS):
            target = targets[done : done + count]
            parts.append(self.sampler.logprobs(logits, target, need.num_logprobs))
            done += count
        return LogprobTensors(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def logit_parts(
        self, hidden_TD: Tensor, step: Batch, index: IntArray, most: int | None = None
    ) -> Iterator[tuple[Tensor, int]]:
        """Logits (n, V) of the tokens ``index``, and n, some tokens at a time.

        Args:
            hidden_TD: Of all tokens.
            step: Whose they are.
            index: Ascending, each token once.
            most: Tokens at a time; None: all.
        """
        model, device = self.loaded.model, self.last_token.device
        is_fixed = self.loaded.platform.capabilities.static_shapes  # all steps do the same
        for rows, count in self.loaded.shapes.logit_rows(index, step, most):
            is_all = not is_fixed and len(rows) == len(hidden_TD)
            wanted = hidden_TD if is_all else hidden_TD[self.on_device(rows)]
            logits = model.logits(wanted)
            if logits.device != device:
                logits = logits.to(device)
            yield logits if count == len(logits) else logits[:count], count

    def on_device(self, array: np.ndarray[Any, Any]) -> Tensor:
        """int64, where the model is."""
        return torch.from_numpy(array).to(self.loaded.platform.device, torch.long)

    def at_sampler(self, array: np.ndarray[Any, Any]) -> Tensor:
        """int64, where tokens are chosen."""
        return torch.from_numpy(array).to(self.last_token.device, torch.long)


class DirectSteps(StepBase):
    """Every op is given to the device when its turn comes, in the sizes that ``Shapes`` allows.

    Args:
        loaded: Model, attention and what they were made for.
        caches: One per layer.
        note: What the user should know of this choice.
    """

    def __init__(self, loaded: Loaded, caches: list[Any], note: str | None = None) -> None:
        super().__init__(loaded, caches, loaded.platform.sampling_device)
        self._note = note

    def rehearsals(self, *, record: bool) -> Iterator[tuple[str, Callable[[], object]]]:
        """Every shape that steps will have where shapes are static, else two short steps."""
        for name, batch in self.loaded.shapes.rehearsals():

            def rehearse(batch: Batch = batch) -> None:
                self.start(batch).result()

            yield name, rehearse

    def start(self, batch: Batch) -> Pending:
        """See ``Steps``."""
        self.begin(batch)
        loaded = self.loaded
        step = loaded.shapes.step(batch)
        wanted, places = self._wanted(step), step.logit_index
        inputs = StepInputs(
            token_ids_T=self._token_ids(step),
            positions_T=self.on_device(loaded.model.positions(step.positions)),
            plan=loaded.attention.plan(step, loaded.need),
            wanted=None if wanted is None else self.on_device(wanted),
        )
        hidden, self.caches = loaded.model.forward(inputs, self.caches)
        result = drafts = prompt = None
        if len(batch.sampled):
            index = places if wanted is None else np.arange(len(places), dtype=np.int32)
            parts = [part for part, _ in self.logit_parts(hidden, step, index)]
            logits = parts[0] if len(parts) == 1 else torch.cat(parts)
            result = self.sample(logits, batch)
            self._remember(batch.rows[batch.sampled], result.token_ids)
        if loaded.draft is not None:
            drafts = loaded.draft.step(batch, result)
        if batch.prompt_logprobs is not None:
            prompt = self.prompt_logprobs(hidden, step, batch.prompt_logprobs)
        return SampledStep(fetch_later, result, prompt, drafts)

    def _remember(self, rows: IndexArray, token_ids: Tensor) -> None:
        """What rows have said last."""
        if token_ids.is_cpu:  # numpy takes a third of the time
            self.last_token.numpy()[rows] = token_ids.numpy()
        else:
            self.last_token[self.at_sampler(rows)] = token_ids

    def _wanted(self, step: Batch) -> IntArray | None:
        """The tokens whose hidden states the step needs, where that spares much; None: all."""
        loaded, index = self.loaded, step.logit_index
        is_fixed = loaded.platform.capabilities.static_shapes
        if is_fixed or not loaded.model.narrows or step.prompt_logprobs is not None:
            return None
        if step.num_tokens - len(index) < _SPARED:
            return None
        return index if len(index) else np.zeros(1, np.int32)

    def _token_ids(self, step: Batch) -> Tensor:
        """(T,) on the device; what is carried over is known where tokens are chosen."""
        tokens = self.at_sampler(step.token_ids)
        if len(step.carried):
            last = self.last_token[self.at_sampler(step.carried_rows)]
            tokens[self.at_sampler(step.carried)] = last
        return tokens.to(self.loaded.platform.device)

    def describe(self) -> str | None:
        """What was noted."""
        return self._note
