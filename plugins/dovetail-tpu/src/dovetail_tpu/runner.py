"""The runner: padded steps through a model that was compiled for a few shapes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
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
from dovetail_tpu.meter import Meter
from dovetail_tpu.packing import pack
from dovetail_tpu.platform import TpuPlatform
from dovetail_tpu.programs import Programs, Tokens
from dovetail_tpu.sampler import Sampler
from dovetail_tpu.xla import XlaAttention

__all__ = ["JaxRunner"]

_LEAST_ROWS = 8
_LEAST_TOKENS = 16
_PROMPT_ROWS = 64
"""Prompt tokens whose log-probabilities are made at a time."""
_KINDS = ((True, False, False), (False, False, False), (False, True, False), (False, True, True))
"""Steps that have sampling programs of their own: all_greedy, restricts, shapes_logits."""


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
        self._choice = choose_attention(
            platform.attention_backends(), self._need, insisted=config.attention_backend
        )
        self._attention: Any = self._choice.backend
        self._buckets = self._sizes()
        self._shapes = PaddedShapes(self._buckets, config)
        self._caches: list[Array] = []

    def _sizes(self) -> Buckets:
        rows, tokens = self._config.max_num_seqs, self._config.max_num_batched_tokens
        blocks = -(-self._config.max_model_len // self._config.block_size)
        least = max(_LEAST_TOKENS, 1 << rows.bit_length())
        # XLA gathers all of a table, kernels only what a row has: for them one width is enough.
        gathers = isinstance(self._attention, XlaAttention) and blocks > _LEAST_ROWS
        return Buckets(
            decode=doubling(min(_LEAST_ROWS, rows), rows),
            tokens=doubling(min(least, tokens), tokens),
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
        rows = self._config.max_num_seqs
        self._programs = Programs(
            self._model, self._weights, self._attention, self._need, self._mesh, rows
        )
        self._sampler = Sampler(self._programs, self._model.vocab_size, rows, self._meter)

    def cache_spec(self) -> CacheSpec:
        """Cost of a block; the first device's free memory less what the largest step needs."""
        free = self._platform.memory().free
        return CacheSpec(
            bytes_per_block=block_bytes(self._attention, self._need),
            bytes_available=max(0, free - self._step_bytes()),
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
        """Make every layer's cache, block 0 included."""
        try:
            self._caches = self._programs.allocate(num_blocks + 1)
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemoryError(
                f"{num_blocks} KV blocks do not fit in the device's memory: {error}."
                " Lower max_model_len, max_num_seqs or gpu_memory_utilization."
            ) from error

    def warm_up(self) -> Iterator[WarmUp]:
        """Compile, or find compiled, every program in every shape, by running it."""
        hidden: dict[int, tuple[Array, Batch]] = {}
        most: list[Array] = []
        for name, batch in self._shapes.rehearsals():

            def forward(batch: Batch = batch) -> None:
                of_tokens, of_rows = self._forward(batch)
                index = np.zeros(_PROMPT_ROWS, np.int32)
                self._meter.run("take", self._programs.take, of_tokens, index)
                hidden[batch.num_rows] = of_rows, batch
                most[:] = [of_tokens]

            yield _timed(name, forward)
        for num_rows, (states, batch) in hidden.items():
            yield _timed(f"sampling {num_rows}", partial(self._rehearse_sampling, states, batch))
        yield _timed("prompts and copies", lambda: self._rehearse_rest(most[0]))

    def _rehearse_sampling(self, hidden: Array, batch: Batch) -> None:
        for greedy, restricts, shapes in _KINDS:
            sampling = replace(
                batch.sampling, all_greedy=greedy, restricts=restricts, shapes_logits=shapes
            )
            step = replace(batch, sampling=sampling)
            tokens, _ = self._sampler.sample(self._weights, hidden, step)
        self._sampler.scores(self._weights, hidden, tokens, step)

    def _rehearse_rest(self, of_tokens: Array) -> None:
        self._sampler.rehearse()
        self._copy(np.zeros((1, 2), np.int32))
        none = np.zeros(_PROMPT_ROWS, np.int32)
        self._prompt_scores(
            of_tokens, PromptLogprobNeed(token_index=none, target=none, num_logprobs=0)
        )
        self._platform.synchronize()

    def step(self, batch: Batch) -> Pending:
        """Start a step; it may still run on return."""
        self._sampler.join(batch.joined)
        self._copy(batch.copies)
        of_tokens, of_rows = self._forward(self._shapes.step(batch))
        result = scores = None
        if len(batch.sampled):
            result = self._sampler.sample(self._weights, of_rows, batch)
            if batch.sampling.num_logprobs is not None:
                scores = self._sampler.scores(self._weights, of_rows, result[0], batch)
        prompt: list[Scores] = []
        if batch.prompt_logprobs is not None:
            prompt = self._prompt_scores(of_tokens, batch.prompt_logprobs)
        return _Step(batch, self._meter, result, scores, prompt)

    def _forward(self, batch: Batch) -> tuple[Array, Array]:
        """Hidden states of the tokens and of the rows of a padded step, as ``Programs.forward``."""
        carried = np.full(batch.num_tokens, -1, np.int32)
        carried[batch.carried] = batch.carried_rows
        tokens = Tokens(
            token_ids=batch.token_ids,
            carried=carried,
            positions=self._model.positions(batch.positions),
            index=padded(batch.logit_index, batch.num_rows),
        )
        of_tokens, of_rows, self._caches = self._meter.run(
            "forward",
            self._programs.forward,
            self._weights,
            self._caches,
            self._sampler.last,
            pack((tokens, self._attention.plan(batch, self._need))),
        )
        return of_tokens, of_rows

    def _copy(self, pairs: IntArray) -> None:
        for some in self._shapes.copies(pairs):
            self._caches = self._meter.run("copy", self._programs.copy, self._caches, some)

    def _prompt_scores(self, of_tokens: Array, need: PromptLogprobNeed) -> list[Scores]:
        """Scores of ``_PROMPT_ROWS`` tokens each."""
        parts = []
        for start in range(0, len(need.target), _PROMPT_ROWS):
            part = slice(start, start + _PROMPT_ROWS)
            index, target = (padded(a[part], _PROMPT_ROWS) for a in (need.token_index, need.target))
            hidden = self._meter.run("take", self._programs.take, of_tokens, index)
            parts.append(self._sampler.score(self._weights, hidden, target, (), need.num_logprobs))
        return parts

    def describe(self) -> dict[str, str]:
        """The attention backend with its reasons, the devices, and the shapes of steps."""
        sizes = self._buckets
        lines = {
            "attention": self._choice.describe(),
            "shapes": f"decode {_listed(sizes.decode)} rows; other steps {_listed(sizes.tokens)}"
            f" tokens; block tables {_listed(sizes.blocks)} wide",
        }
        if self._mesh.size > 1:
            lines["parallel"] = f"{self._mesh.size} devices share every layer"
        return lines

    def close(self) -> None:
        """Drop weights, cache and programs."""
        self._caches = []
        del self._weights, self._programs, self._sampler


class _Step:
    """A step's arrays, on their way to the host, turned into numpy when they are asked for."""

    def __init__(
        self,
        batch: Batch,
        meter: Meter,
        result: tuple[Array, Array] | None,
        scores: Scores | None,
        prompt: list[Scores],
    ) -> None:
        self._batch, self._meter = batch, meter
        self._result, self._scores, self._prompt = result, scores, prompt
        for array in jax.tree.leaves((result, scores, prompt)):
            array.copy_to_host_async()

    def result(self) -> StepOutput:
        """See ``core.batch.StepOutput``."""
        batch, num_sampled = self._batch, len(self._batch.sampled)
        tokens, finite = np.zeros((0,), np.int32), np.zeros(0, np.bool_)
        if self._result is not None:
            tokens, finite = (self._meter.fetch(array)[:num_sampled] for array in self._result)
        need, k = batch.prompt_logprobs, batch.sampling.num_logprobs or 0
        return StepOutput(
            token_ids=tokens[:, None],
            num_tokens=np.ones(num_sampled, np.int32),
            finite=finite,
            logprobs=None if self._scores is None else self._arrays([self._scores], num_sampled, k),
            prompt_logprobs=None
            if need is None
            else self._arrays(self._prompt, len(need.target), need.num_logprobs),
        )

    def _arrays(self, parts: list[Scores], count: int, k: int) -> LogprobArrays:
        ids, logprobs, ranks = (
            np.concatenate([self._meter.fetch(array) for array in column])[:count]
            for column in zip(*parts, strict=True)
        )
        return LogprobArrays(token_ids=ids[:, : k + 1], logprobs=logprobs[:, : k + 1], ranks=ranks)


def _timed(name: str, work: Callable[[], object]) -> WarmUp:
    start = time.perf_counter()
    work()
    return WarmUp(name=name, seconds=time.perf_counter() - start)


def _listed(sizes: tuple[int, ...]) -> str:
    return ", ".join(map(str, sizes))
