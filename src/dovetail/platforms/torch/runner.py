"""The runner of every torch platform: weights in, steps through the model, tokens out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch, LogprobArrays, PromptLogprobNeed, StepOutput
from dovetail.core.contracts.model import StepInputs
from dovetail.core.contracts.runner import CacheSpec, Pending, RunnerConfig, RunnerPlan, WarmUp
from dovetail.core.errors import OutOfMemoryError, UnsupportedError
from dovetail.core.models.demand import attention_need, block_bytes, widest_window
from dovetail.core.shapes import FreeShapes, PaddedShapes, Shapes
from dovetail.core.types import BoolArray, IntArray
from dovetail.platforms.torch.draft import DraftModel
from dovetail.platforms.torch.loading import RunnableModel, load_model
from dovetail.platforms.torch.planning import (
    LOGIT_ROWS,
    choose_backend,
    plan_runner,
    step_bytes,
)
from dovetail.platforms.torch.platform import TorchPlatform
from dovetail.platforms.torch.sampler import LogprobTensors, Sampler, SampleResult

__all__ = ["TorchRunner"]


class TorchRunner:
    """Runs steps of one model on one torch device.

    Args:
        platform: Asked for the device, its ops, its linear layers and its attention backends.
        config: Everything decided.
    """

    def __init__(self, platform: TorchPlatform, config: RunnerConfig) -> None:
        self._platform = platform
        self._config = config
        self._device = platform.device
        self._sampling_device = platform.sampling_device
        self._shapes = _shapes_of(platform, config)
        self._caches: list[Any] = []
        self._draft = None if config.draft is None else DraftModel(platform, config.draft)

    def plan(self) -> RunnerPlan:
        """What loading a native model would choose and take."""
        return plan_runner(self._platform, self._config)

    def load(self) -> Iterator[tuple[int, int]]:
        """Read the weights and choose the attention backend."""
        try:
            yield from self._load()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"The weights do not fit in the device's memory: {error}. Choose a smaller model,"
                " or a dtype of fewer bytes."
            ) from error

    def _load(self) -> Iterator[tuple[int, int]]:
        model = yield from load_model(self._platform, self._config)
        self._need = attention_need(self._config, model.attention_specs)
        self._choice = choose_backend(self._platform, self._config, self._need)
        self._attention = self._choice.backend
        model.bind_attention(self._attention)
        self._model: RunnableModel = model
        if self._draft is not None:
            yield from self._draft.load()
        rows, vocab = self._config.max_num_seqs, model.vocab_size
        self._sampler = Sampler(vocab, rows, self._sampling_device)
        self._last_token = torch.zeros(rows, dtype=torch.long, device=self._sampling_device)

    def cache_spec(self) -> CacheSpec:
        """Cost of a block; the device's free memory less what the largest step needs."""
        free = self._platform.memory(self._device.index or 0).free
        per_block, windows = block_bytes(self._attention, self._need), [self._need.window]
        if self._draft is not None:
            per_block += self._draft.bytes_per_block
            windows.append(self._draft.window)
        return CacheSpec(
            bytes_per_block=per_block,
            bytes_available=max(0, free - step_bytes(self._config, self._model.vocab_size)),
            window=widest_window(windows),
        )

    def allocate(self, num_blocks: int) -> None:
        """Make every layer's cache, block 0 included."""
        try:
            self._caches = [
                self._attention.allocate(spec, self._need, num_blocks + 1)
                for spec in self._need.specs
            ]
            if self._draft is not None:
                self._draft.allocate(num_blocks + 1)
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemoryError(
                f"{num_blocks} KV blocks do not fit in the device's memory: {error}."
                " Lower max_model_len, max_num_seqs or gpu_memory_utilization."
            ) from error

    def warm_up(self) -> Iterator[WarmUp]:
        """Run every shape that steps will have where shapes are static, else two short steps."""
        for name, batch in self._shapes.rehearsals():
            start = time.perf_counter()
            self.step(batch).result()
            yield WarmUp(name=name, seconds=time.perf_counter() - start)

    def step(self, batch: Batch) -> Pending:
        """Start a step; on a device with a queue of its own it may still run on return.

        Raises:
            OutOfMemoryError: The device's memory does not suffice. Another step may.
        """
        try:
            return self._start(batch)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"A step of {batch.num_tokens} tokens does not fit in the device's memory: {error}."
                " Lower max_num_batched_tokens, max_num_seqs or gpu_memory_utilization."
            ) from error

    @torch.inference_mode()
    def _start(self, batch: Batch) -> Pending:
        self._sampler.join(batch.joined)
        self._copy_blocks(batch.copies)
        step = self._shapes.step(batch)
        inputs = StepInputs(
            token_ids_T=self._token_ids(step),
            positions_T=self._tensor(self._model.positions(step.positions)),
            plan=self._attention.plan(step, self._need),
        )
        hidden, self._caches = self._model.forward(inputs, self._caches)
        result = drafts = None
        if len(batch.sampled):
            logits = self._logits(hidden, step)
            result = self._sampler.sample(logits, batch)
            self._last_token[self._at_sampler(batch.rows[batch.sampled])] = result.token_ids
        if self._draft is not None:
            drafts = self._draft.step(batch, result)
        prompt = None
        if batch.prompt_logprobs is not None:
            prompt = self._prompt_logprobs(hidden, step, batch.prompt_logprobs)
        return _Step(result, prompt, drafts)

    def _copy_blocks(self, copies: IntArray) -> None:
        for pairs in self._shapes.copies(copies):
            self._caches = list(self._attention.copy_blocks(self._caches, pairs))
            if self._draft is not None:
                self._draft.copy_blocks(pairs)

    def _token_ids(self, step: Batch) -> Tensor:
        """(T,) on the device; what is carried over is known where tokens are chosen."""
        tokens = self._at_sampler(step.token_ids)
        if len(step.carried):
            last = self._last_token[self._at_sampler(step.carried_rows)]
            tokens[self._at_sampler(step.carried)] = last
        return tokens.to(self._device)

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device, torch.long)

    def _at_sampler(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._sampling_device, torch.long)

    def _logits(self, hidden: Tensor, step: Batch) -> Tensor:
        """(G, V), where tokens are chosen."""
        parts = [part for part, _ in self._logit_parts(hidden, step, step.logit_index)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _logit_parts(
        self, hidden: Tensor, step: Batch, index: IntArray, most: int | None = None
    ) -> Iterator[tuple[Tensor, int]]:
        """Logits (n, V) of the tokens ``index``, and n, some tokens at a time."""
        for rows, count in self._shapes.logit_rows(index, step, most):
            logits = self._model.logits(hidden[self._tensor(rows)]).to(self._sampling_device)
            yield logits[:count], count

    def _prompt_logprobs(
        self, hidden: Tensor, step: Batch, need: PromptLogprobNeed
    ) -> LogprobTensors:
        targets, done = self._at_sampler(need.target), 0
        parts = []
        for logits, count in self._logit_parts(hidden, step, need.token_index, LOGIT_ROWS):
            target = targets[done : done + count]
            parts.append(self._sampler.logprobs(logits, target, need.num_logprobs))
            done += count
        return LogprobTensors(*(torch.cat(column) for column in zip(*parts, strict=True)))

    def describe(self) -> dict[str, str]:
        """The attention backend with its reasons, and which ops are the platform's own."""
        return {"attention": self._choice.describe(), **self._model.describe()}

    def close(self) -> None:
        """Drop weights and cache."""
        self._caches = []
        self._draft = None
        del self._model


class _Step:
    """A step's tensors, turned into numpy when they are asked for."""

    def __init__(
        self, result: SampleResult | None, prompt: LogprobTensors | None, drafts: IntArray | None
    ) -> None:
        self._result = result
        self._prompt = prompt
        self._drafts = drafts

    def result(self) -> StepOutput:
        prompt = None if self._prompt is None else _arrays(self._prompt)
        if self._result is None:
            nothing = np.zeros((0, 1), np.int32)
            return StepOutput(
                token_ids=nothing,
                num_tokens=nothing[:, 0],
                finite=np.zeros(0, np.bool_),
                prompt_logprobs=prompt,
            )
        token_ids, num_tokens, finite = _chosen(self._result)
        return StepOutput(
            token_ids=token_ids,
            num_tokens=num_tokens,
            finite=finite,
            drafts=self._drafts,
            failures=self._result.failures,
            logprobs=None if self._result.logprobs is None else _arrays(self._result.logprobs),
            prompt_logprobs=prompt,
        )


def _chosen(result: SampleResult) -> tuple[IntArray, IntArray, BoolArray]:
    """Token ids (S, W), how many are valid (S,), and which rows are finite (S,): in one copy."""
    columns = (result.chosen, result.num_tokens[:, None], result.finite[:, None])
    packed = torch.cat(columns, 1).to("cpu", torch.int32).numpy()
    return packed[:, :-2], packed[:, -2], packed[:, -1].astype(np.bool_)


def _shapes_of(platform: TorchPlatform, config: RunnerConfig) -> Shapes:
    """Raises UnsupportedError where they are static and there is a draft model."""
    if platform.capabilities.static_shapes:
        if config.draft is not None:
            raise UnsupportedError(
                f"platform {platform.name} has static shapes, and the steps of a draft model are"
                " not padded; the methods ngram and suffix need none"
            )
        return PaddedShapes(platform.buckets(config), config)
    return FreeShapes()


def _arrays(tensors: LogprobTensors) -> LogprobArrays:
    return LogprobArrays(
        token_ids=tensors.token_ids.to("cpu", torch.int32).numpy(),
        logprobs=tensors.logprobs.float().cpu().numpy(),
        ranks=tensors.ranks.to("cpu", torch.int32).numpy(),
    )
