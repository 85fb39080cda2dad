"""The runner: padded steps through a model that was compiled for a few shapes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh

from dovetail.core.batch import Batch, LogprobArrays, PromptLogprobNeed, StepOutput
from dovetail.core.buckets import Buckets, doubling, padded
from dovetail.core.contracts.runner import CacheSpec, Pending, RunnerConfig, RunnerPlan, WarmUp
from dovetail.core.errors import OutOfMemoryError
from dovetail.core.models.demand import attention_need, block_bytes, widest_layer
from dovetail.core.models.load import define, read_weights, weight_bytes
from dovetail.core.models.split import check_split, share_of_attention
from dovetail.core.plugins.attention import choose_attention
from dovetail.core.shapes import PaddedShapes
from dovetail.core.types import ITEM_SIZE, IntArray
from dovetail_tpu.choice import Scores
from dovetail_tpu.loading import AXIS, Binder
from dovetail_tpu.platform import TpuPlatform
from dovetail_tpu.programs import Programs
from dovetail_tpu.sampler import Sampler
from dovetail_tpu.transfers import Meter, Packed, pack
from dovetail_tpu.xla import XlaAttention

__all__ = ["JaxRunner"]

_LEAST_ROWS = 8
_LEAST_TOKENS = 16
_PROMPT_ROWS = 64
"""Prompt tokens whose log-probabilities are made at a time."""
_RAW = np.ones(_PROMPT_ROWS, np.float32)
"""Temperatures of theirs."""


class JaxRunner:
    """Runs steps of one model on one device, or on several that share its layers.

    Args:
        platform: Whose devices and attention backends serve.
        config: Everything decided.

    Raises:
        UserError: The model cannot be served so.
    """

    def __init__(self, platform: TpuPlatform, config: RunnerConfig) -> None:
        self._platform, self._config, self._meter = platform, config, platform.meter
        size = config.tensor_parallel_size
        self._mesh = Mesh(np.array(platform.devices[:size]), (AXIS,))
        self._model = define(config)
        specs = self._model.attention_specs()
        check_split(self._model.weights(), specs, size)
        shares = tuple(share_of_attention(spec, 0, size) for spec in specs)
        self._need = attention_need(config, shares)
        backends = platform.attention_backends()
        self._choice = choose_attention(backends, self._need, insisted=config.attention_backend)
        self._attention: Any = self._choice.backend
        self._buckets = self._sizes()
        self._shapes = PaddedShapes(self._buckets, config)

    def _sizes(self) -> Buckets:
        rows, tokens = self._config.max_num_seqs, self._config.max_num_batched_tokens
        blocks = -(-self._config.max_model_len // self._config.block_size)
        # XLA gathers all of a table, kernels only what a row has: for them one width is enough.
        gathers = isinstance(self._attention, XlaAttention) and blocks > _LEAST_ROWS
        return Buckets(
            decode=doubling(_LEAST_ROWS, rows),
            tokens=doubling(max(_LEAST_TOKENS, 1 << rows.bit_length()), tokens),
            blocks=(-(-blocks // 4), blocks) if gathers else (blocks,),
        )

    def plan(self) -> RunnerPlan:
        """Of one device, from the declaration of the model."""
        return RunnerPlan(
            weight_bytes=weight_bytes(self._model, self._config),
            step_bytes=self._step_bytes(),
            bytes_per_block=block_bytes(self._attention, self._need),
            window=self._need.window,
            choices=self.describe(),
        )

    def load(self) -> Iterator[tuple[int, int]]:
        """Read the weights, straight into the devices' memory."""
        binder = Binder(self._mesh, self._config.dtype)
        self._weights = yield from read_weights(self._model, self._config, binder)
        self._programs = Programs(
            self._model, self._weights, self._attention, self._need, self._mesh, self._meter
        )

    def cache_spec(self) -> CacheSpec:
        """Cost of a block; the first device's free memory less what the largest step needs."""
        return CacheSpec(
            bytes_per_block=block_bytes(self._attention, self._need),
            bytes_available=max(0, self._platform.memory().free - self._step_bytes()),
            window=self._need.window,
        )

    def _step_bytes(self) -> int:
        """An upper bound of the arrays that a step holds at once, without the cache."""
        config, item, vocab = self._config, ITEM_SIZE[self._config.dtype], self._model.vocab_size
        activations = config.max_num_batched_tokens * widest_layer(config, vocab) * item * 8
        rows = max(config.max_num_seqs, _PROMPT_ROWS)
        # Logits, their order, weights of 8 bytes; and what rows with rules ask for.
        sampling = rows * vocab * 40 + config.max_num_seqs * vocab * 10
        gathered = 0
        if isinstance(self._attention, XlaAttention):
            # Of one layer at a time: keys and values, and both again in float32.
            layer = block_bytes(self._attention, self._need) // len(self._need.specs)
            gathered = config.max_num_seqs * self._buckets.blocks[-1] * layer * 4
        return activations + sampling + gathered

    def allocate(self, num_blocks: int) -> None:
        """Make every layer's cache, block 0 included, and what rows keep."""
        try:
            self._caches: list[Array] = self._programs.allocate(num_blocks + 1)
            self._sampler = Sampler(
                self._programs, self._model.vocab_size, self._config.max_num_seqs
            )
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemoryError(
                f"{num_blocks} KV blocks do not fit in the device's memory: {error}."
                " Lower max_model_len, max_num_seqs or gpu_memory_utilization."
            ) from error

    def warm_up(self) -> Iterator[WarmUp]:
        """Compile, or find compiled, every program in every shape, by running it."""
        parts = list(self._shapes.rehearsals())
        for name, batch in parts:
            start = time.perf_counter()
            for step in _rehearsals(batch):
                self.step(step).result()
            yield WarmUp(name=name, seconds=time.perf_counter() - start, num_parts=len(parts))

    def step(self, batch: Batch) -> Pending:
        """Start a step; it may still run on return."""
        self._sampler.join(batch.joined)
        self._copy(batch.copies)
        self._caches, of_tokens, of_rows = self._programs.forward(
            self._caches, self._sampler.last, self._inputs(self._shapes.step(batch))
        )
        chosen, scores, prompt, k = None, [], [], batch.sampling.num_logprobs
        if len(batch.sampled):
            chosen = self._sampler.sample(of_rows, batch)
            if k is not None:
                heats = self._sampler.heats[batch.rows[batch.sampled]]
                scores = [self._sampler.score(of_rows, chosen[0], heats, k)]
        if batch.prompt_logprobs is not None:
            prompt = self._prompt_scores(of_tokens, batch.prompt_logprobs)
        return _Step(batch, self._meter, (chosen, scores, prompt))

    def _copy(self, pairs: IntArray) -> None:
        for some in self._shapes.copies(pairs):
            self._caches = self._programs.copy(self._caches, some)

    def _inputs(self, batch: Batch) -> Packed:
        """What ``Programs.forward`` is told of a padded step."""
        carried = np.full(batch.num_tokens, -1, np.int32)
        carried[batch.carried] = batch.carried_rows
        positions = self._model.positions(batch.positions)
        index = padded(batch.logit_index, batch.num_rows)
        plan = self._attention.plan(batch, self._need)
        return pack((batch.token_ids, carried, positions, index, plan))

    def _prompt_scores(self, of_tokens: Array, need: PromptLogprobNeed) -> list[Scores]:
        """Scores of ``_PROMPT_ROWS`` tokens each."""
        parts, known = [], np.stack((need.token_index, need.target))
        for start in range(0, len(need.target), _PROMPT_ROWS):
            index, target = padded(known[:, start : start + _PROMPT_ROWS], _PROMPT_ROWS, axis=1)
            hidden = self._programs.take(of_tokens, index)
            parts.append(self._sampler.score(hidden, target, _RAW, need.num_logprobs))
        return parts

    def describe(self) -> dict[str, str]:
        """The attention backend with its reasons, the devices, and the shapes of steps."""
        sizes = (self._buckets.decode, self._buckets.tokens, self._buckets.blocks)
        rows, tokens, blocks = (", ".join(map(str, each)) for each in sizes)
        shapes = f"decode {rows} rows; other steps {tokens} tokens; block tables {blocks} wide"
        lines = {"attention": self._choice.describe(), "shapes": shapes}
        if self._mesh.size > 1:
            lines["parallel"] = f"{self._mesh.size} devices share every layer"
        return lines

    def close(self) -> None:
        """Drop weights, cache and programs, and all else."""
        vars(self).clear()


class _Step:
    """A step's arrays, on their way to the host, turned into numpy when they are asked for.

    Args:
        batch: The step.
        meter: Fetches.
        arrays: Tokens and whether they are finite, if rows got any; scores of them, and of prompts.
    """

    def __init__(self, batch: Batch, meter: Meter, arrays: Any) -> None:
        self._batch, self._meter, self._arrays = batch, meter, arrays
        for array in jax.tree.leaves(arrays):
            array.copy_to_host_async()

    def result(self) -> StepOutput:
        """See ``core.batch.StepOutput``."""
        batch, num_sampled = self._batch, len(self._batch.sampled)
        chosen, scores, prompt = jax.tree.map(self._meter.fetch, self._arrays)
        tokens, finite = chosen or (np.zeros(0, np.int32), np.zeros(0, np.bool_))
        need, k = batch.prompt_logprobs, batch.sampling.num_logprobs or 0
        return StepOutput(
            token_ids=tokens[:num_sampled, None],
            num_tokens=np.ones(num_sampled, np.int32),
            finite=finite[:num_sampled],
            logprobs=_joined(scores, num_sampled, k) if scores else None,
            prompt_logprobs=_joined(prompt, len(need.target), need.num_logprobs) if need else None,
        )


def _joined(parts: list[Scores], count: int, k: int) -> LogprobArrays:
    ids, logprobs, ranks = (np.concatenate(column)[:count] for column in zip(*parts, strict=True))
    return LogprobArrays(token_ids=ids[:, : k + 1], logprobs=logprobs[:, : k + 1], ranks=ranks)


def _rehearsals(batch: Batch) -> Iterator[Batch]:
    """A step that wants everything, without rules and with them."""
    token = np.zeros(1, np.int32)
    prompt = PromptLogprobNeed(token_index=token, target=token, num_logprobs=0)
    for shapes in (False, True):
        sampling = replace(batch.sampling, num_logprobs=0, shapes_logits=shapes)
        yield replace(batch, sampling=sampling, prompt_logprobs=prompt)
