"""The runner of every torch platform: weights in, steps through the model, tokens out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch, LogprobArrays, PromptLogprobNeed, SamplingBatch, StepOutput
from dovetail.core.contracts.model import StepInputs
from dovetail.core.contracts.runner import CacheSpec, Pending, RunnerConfig, RunnerPlan, WarmUp
from dovetail.core.errors import OutOfMemoryError
from dovetail.core.types import IntArray
from dovetail.platforms.torch.draft import DraftModel
from dovetail.platforms.torch.loading import RunnableModel, load_model
from dovetail.platforms.torch.planning import (
    LOGIT_ROWS,
    attention_need,
    block_bytes,
    choose_backend,
    plan_runner,
    step_bytes,
    widest,
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
        self._caches: list[Any] = []
        self._draft = None if config.draft is None else DraftModel(platform, config.draft)

    def plan(self) -> RunnerPlan:
        """What loading a native model would choose and take."""
        return plan_runner(self._platform, self._config)

    def load(self) -> Iterator[tuple[int, int]]:
        """Read the weights and choose the attention backend."""
        model = yield from load_model(self._platform, self._config)
        self._need = attention_need(self._config, model.attention_specs)
        self._choice = choose_backend(self._platform, self._config, self._need)
        self._attention = self._choice.backend
        model.bind_attention(self._attention)
        self._model: RunnableModel = model
        if self._draft is not None:
            yield from self._draft.load()
        rows, vocab = self._config.max_num_seqs, model.vocab_size
        self._sampler = Sampler(vocab, rows, self._device)
        self._last_token = torch.zeros(rows, dtype=torch.long, device=self._device)

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
            window=widest(windows),
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
        """Run a short prompt and a token after it: kernels and threads are set up on first use."""
        for name, context, count in (("prefill", 0, 8), ("decode", 8, 1)):
            start = time.perf_counter()
            self.step(_rehearsal(context, count)).result()
            yield WarmUp(name=name, seconds=time.perf_counter() - start)

    @torch.inference_mode()
    def step(self, batch: Batch) -> Pending:
        """Start a step; on a device with a queue of its own it may still run on return."""
        self._sampler.join(batch.joined)
        if len(batch.copies):
            self._caches = list(self._attention.copy_blocks(self._caches, batch.copies))
            if self._draft is not None:
                self._draft.copy_blocks(batch.copies)
        tokens = self._tensor(batch.token_ids)
        if len(batch.carried):
            tokens[self._tensor(batch.carried)] = self._last_token[self._tensor(batch.carried_rows)]
        inputs = StepInputs(
            token_ids_T=tokens,
            positions_T=self._tensor(self._model.positions(batch.positions)),
            plan=self._attention.plan(batch, self._need),
        )
        hidden, self._caches = self._model.forward(inputs, self._caches)
        result = drafts = None
        if len(batch.sampled):
            logits = self._model.logits(hidden[self._tensor(batch.logit_index)])
            result = self._sampler.sample(logits, batch)
            self._last_token[self._tensor(batch.rows[batch.sampled])] = result.token_ids
        if self._draft is not None:
            drafts = self._draft.step(batch, result)
        prompt = None
        if batch.prompt_logprobs is not None:
            prompt = self._prompt_logprobs(hidden, batch.prompt_logprobs)
        return _Step(result, prompt, drafts)

    def _tensor(self, array: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(array).to(self._device, torch.long)

    def _prompt_logprobs(self, hidden: Tensor, need: PromptLogprobNeed) -> LogprobTensors:
        index, target = self._tensor(need.token_index), self._tensor(need.target)
        parts = [
            self._sampler.logprobs(self._model.logits(hidden[i]), t, need.num_logprobs)
            for i, t in zip(
                torch.split(index, LOGIT_ROWS), torch.split(target, LOGIT_ROWS), strict=True
            )
        ]
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
        return StepOutput(
            token_ids=self._result.chosen.to("cpu", torch.int32).numpy(),
            num_tokens=self._result.num_tokens.to("cpu", torch.int32).numpy(),
            finite=self._result.finite.cpu().numpy(),
            drafts=self._drafts,
            failures=self._result.failures,
            logprobs=None if self._result.logprobs is None else _arrays(self._result.logprobs),
            prompt_logprobs=prompt,
        )


def _rehearsal(num_context: int, num_tokens: int) -> Batch:
    """A step of one row in block 1, which nobody has yet."""
    one, zero, row = np.ones(1, np.float32), np.zeros(1, np.int32), np.zeros(1, np.intp)
    return Batch(
        step=0,
        rows=row,
        query_lens=np.array([num_tokens], np.int32),
        context_lens=np.array([num_context], np.int32),
        block_tables=np.ones((1, num_context + num_tokens), np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
        carried=row[:0],
        carried_rows=row[:0],
        sampled=row,
        sampling=SamplingBatch(
            temperature=one * 0,
            top_k=zero,
            top_p=one,
            min_p=one * 0,
            uniform=one * 0,
            num_generated=zero,
            all_greedy=True,
            restricts=False,
            shapes_logits=False,
            num_logprobs=None,
        ),
        copies=np.zeros((0, 2), np.int32),
    )


def _arrays(tensors: LogprobTensors) -> LogprobArrays:
    return LogprobArrays(
        token_ids=tensors.token_ids.to("cpu", torch.int32).numpy(),
        logprobs=tensors.logprobs.float().cpu().numpy(),
        ranks=tensors.ranks.to("cpu", torch.int32).numpy(),
    )
