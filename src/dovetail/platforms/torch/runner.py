"""The runner of every torch platform: weights in, steps through the model, tokens out."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch

from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import RecordableAttention
from dovetail.core.contracts.observation import OpsView, Wrap
from dovetail.core.contracts.runner import CacheSpec, Pending, RunnerConfig, RunnerPlan, WarmUp
from dovetail.core.errors import OutOfMemoryError, UnsupportedError
from dovetail.core.models.demand import attention_need, block_bytes, widest_window
from dovetail.core.shapes import FreeShapes, PaddedShapes, Shapes
from dovetail.platforms.torch.draft import DraftModel
from dovetail.platforms.torch.loading import load_model
from dovetail.platforms.torch.planning import choose_backend, plan_runner, step_bytes
from dovetail.platforms.torch.platform import TorchPlatform
from dovetail.platforms.torch.staged import StagedSteps
from dovetail.platforms.torch.steps import DirectSteps, Loaded, Steps
from dovetail.platforms.torch.understudy import Understudy, understudied

__all__ = ["TorchRunner"]

_REHEARSAL_BLOCKS = 1


class TorchRunner:
    """Runs steps of one model on one torch device.

    Args:
        platform: Asked for the device, its ops, its linear layers and its attention backends.
        config: Everything decided.
        compiles_ahead: Kernels are compiled while weights are read, if the platform compiles any.
    """

    def __init__(
        self, platform: TorchPlatform, config: RunnerConfig, *, compiles_ahead: bool = True
    ) -> None:
        self._platform = platform
        self._config = config
        self._compiles_ahead = compiles_ahead and platform.compiles_kernels
        self._shapes = _shapes_of(platform, config)
        self._recorded: str | None = None
        self._draft = None if config.draft is None else DraftModel(platform, config.draft)

    def plan(self) -> RunnerPlan:
        """What loading a native model would choose and take."""
        return plan_runner(self._platform, self._config)

    def load(self) -> Iterator[tuple[int, int]]:
        """Read the weights and choose the attention backend."""
        self._understudy = self._compile_ahead()
        try:
            yield from self._load()
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"The weights do not fit in the device's memory: {error}. Choose a smaller model,"
                " or a dtype of fewer bytes."
            ) from error

    def _load(self) -> Iterator[tuple[int, int]]:
        model = yield from load_model(self._platform, self._config)
        need = attention_need(self._config, model.attention_specs)
        self._choice = choose_backend(self._platform, self._config, need)
        model.bind_attention(self._choice.backend)
        model = self._platform.prepared(model)
        if self._draft is not None:
            yield from self._draft.load()
        self._loaded = Loaded(
            platform=self._platform,
            config=self._config,
            model=model,
            attention=self._choice.backend,
            need=need,
            shapes=self._shapes,
            draft=self._draft,
        )

    def _compile_ahead(self) -> Understudy | None:
        """Where kernels have to be compiled, and the memory suffices for both models."""
        platform, config = self._platform, self._config
        if not self._compiles_ahead or config.model_impl != "native":
            return None
        small = plan_runner(platform, understudied(config))
        wanted = self.plan().weight_bytes + small.weight_bytes + small.step_bytes
        if wanted > platform.memory(platform.device.index or 0).free:
            return None
        return Understudy(partial(_rehearse, platform), config)

    def cache_spec(self) -> CacheSpec:
        """Cost of a block; the device's free memory less what the largest step needs."""
        if self._understudy is not None:
            self._understudy.wait()
        need, vocab = self._loaded.need, self._loaded.model.vocab_size
        free = self._platform.memory(self._platform.device.index or 0).free
        per_block, windows = block_bytes(self._loaded.attention, need), [need.window]
        if self._draft is not None:
            per_block += self._draft.bytes_per_block
            windows.append(self._draft.window)
        return CacheSpec(
            bytes_per_block=per_block,
            bytes_available=max(0, free - step_bytes(self._config, vocab)),
            window=widest_window(windows),
        )

    def allocate(self, num_blocks: int) -> None:
        """Make every layer's cache, block 0 included."""
        attention, need = self._loaded.attention, self._loaded.need
        try:
            caches = [attention.allocate(spec, need, num_blocks + 1) for spec in need.specs]
            if self._draft is not None:
                self._draft.allocate(num_blocks + 1)
            self._steps = _steps(self._loaded, caches)
            self._recorded = self._steps.describe()
        except (RuntimeError, MemoryError) as error:
            raise OutOfMemoryError(
                f"{num_blocks} KV blocks do not fit in the device's memory: {error}."
                " Lower max_model_len, max_num_seqs or gpu_memory_utilization."
            ) from error

    def warm_up(self) -> Iterator[WarmUp]:
        """Whatever the steps to come would otherwise wait for."""
        parts = list(self._steps.rehearsals(record=True))
        for name, rehearse in parts:
            start = time.perf_counter()
            with torch.inference_mode():
                rehearse()
            yield WarmUp(name=name, seconds=time.perf_counter() - start, num_parts=len(parts))
        self._recorded = self._steps.describe()

    def step(self, batch: Batch) -> Pending:
        """Start a step; on a device with a queue of its own it may still run on return.

        Raises:
            OutOfMemoryError: The device's memory does not suffice. Another step may.
        """
        try:
            with torch.inference_mode():
                return self._steps.start(batch)
        except torch.OutOfMemoryError as error:
            raise OutOfMemoryError(
                f"A step of {batch.num_tokens} tokens does not fit in the device's memory: {error}."
                " Lower max_num_batched_tokens, max_num_seqs or gpu_memory_utilization."
            ) from error

    @contextmanager
    def wrap_ops(self, wrap: Wrap) -> Iterator[OpsView]:
        """See ``ObservableRunner``."""
        with self._loaded.model.wrap_ops(wrap) as view, self._steps.wrap_sampling(wrap):
            yield view

    def describe(self) -> dict[str, str]:
        """The attention backend with its reasons, and which ops are the platform's own."""
        lines = {"attention": self._choice.describe(), **self._loaded.model.describe()}
        return lines if self._recorded is None else {**lines, "recorded": self._recorded}

    def close(self) -> None:
        """Drop weights and cache, as far as they are there."""
        self._draft = None
        for held in ("_loaded", "_steps"):
            vars(self).pop(held, None)


def _rehearse(platform: TorchPlatform, config: RunnerConfig) -> None:
    """What the kernels of a model are compiled for, once each; nothing is kept.

    Tokens are not carried from one rehearsal to the next, so none of what it computes is looked at.
    """
    runner = TorchRunner(platform, config, compiles_ahead=False)
    for _ in runner.load():
        pass
    runner.allocate(_REHEARSAL_BLOCKS)
    with torch.inference_mode(), platform.only_compiling():
        for _, work in runner._steps.rehearsals(record=False):
            work()
    runner.close()


def _steps(loaded: Loaded, caches: list[Any]) -> Steps:
    """How the platform's device is best fed."""
    queue = loaded.platform.queue()
    if queue is None:
        return DirectSteps(loaded, caches)
    if not isinstance(loaded.attention, RecordableAttention):
        why = f"attention backend {loaded.attention.name} cannot be recorded"
        return DirectSteps(loaded, caches, note=f"no steps: {why}")
    return StagedSteps(loaded, caches, queue, records=loaded.platform.records_steps(loaded.config))


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
