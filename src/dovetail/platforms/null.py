"""A platform that computes nothing: every sampled token is the same one. Needs no torch.

It measures what the host costs, and drives the scheduler in tests. Its options
(``RunnerConfig.options``): ``memory``, bytes for the KV cache; ``token``, the token to give;
``step_us``, microseconds that a step pretends to take.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.contracts.platform import (
    API_VERSION,
    Capabilities,
    Memory,
    Platform,
    PlatformPlugin,
    ProbeResult,
)
from dovetail.core.contracts.runner import (
    CacheSpec,
    Pending,
    Runner,
    RunnerConfig,
    RunnerPlan,
    WarmUp,
)
from dovetail.core.errors import ConfigError
from dovetail.core.types import IntArray
from dovetail.platforms.pretend import (
    cache_plan,
    check_fit,
    end_tokens,
    flat_logprobs,
    positive_option,
    vocabulary,
)

__all__ = ["PLUGIN", "NullPlatform", "NullRunner"]

_BYTES_PER_POSITION = 1024
_DEFAULT_MEMORY = 1 << 30
_OPTIONS = ("memory", "token", "step_us")


class NullPlatform(Platform):
    """No device at all. Chosen only when it is named."""

    name = "null"
    capabilities = Capabilities(
        family="null",
        dtypes=("float32", "bfloat16", "float16"),
        kv_dtypes=("auto", "float32", "bfloat16", "float16"),
        block_sizes=(16, 1, 2, 4, 8, 32, 64, 128, 256),
        features=frozenset({"prompt_logprobs", "deterministic", "speculation"}),
        async_steps=True,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
    )

    def device_names(self) -> list[str]:
        """One, that does nothing."""
        return ["nothing"]

    def memory(self, device: int = 0) -> Memory:
        """What the KV cache may pretend to take, unless the option says otherwise."""
        return Memory(free=_DEFAULT_MEMORY, total=_DEFAULT_MEMORY)

    def runner(self, config: RunnerConfig) -> Runner:
        """A runner. Raises ConfigError for a wrong option."""
        return NullRunner(config)


class NullRunner:
    """Gives the same arrays again and again; they are read-only.

    Raises:
        CheckpointError: The model's config has no ``vocab_size``.
        ConfigError: An option is unknown or out of range.
    """

    def __init__(self, config: RunnerConfig) -> None:
        self._vocab_size = vocabulary(config.hf_config)
        config.check_options("null", *_OPTIONS)
        self._token = _token(config, self._vocab_size)
        self._cache = CacheSpec(
            bytes_per_block=config.block_size * _BYTES_PER_POSITION,
            bytes_available=positive_option(config.options, "memory", _DEFAULT_MEMORY),
        )
        self._step_s = self._end = 0.0
        if "step_us" in config.options:
            self._step_s = positive_option(config.options, "step_us", 1) / 1e6
        self._outputs = _Constants(config.max_num_seqs, self._token)

    def plan(self) -> RunnerPlan:
        """Nothing but the cache takes memory."""
        return cache_plan(self._cache, self.describe())

    def load(self) -> Iterator[tuple[int, int]]:
        """There are no weights."""
        return iter(())

    def cache_spec(self) -> CacheSpec:
        """A KiB for each position, of the memory that the option gives."""
        return self._cache

    def allocate(self, num_blocks: int) -> None:
        """Allocates nothing. Raises OutOfMemoryError where a device of this size would."""
        check_fit(num_blocks, self._cache)

    def warm_up(self) -> Iterator[WarmUp]:
        """There is nothing to compile."""
        return iter(())

    def step(self, batch: Batch) -> Pending:
        """The same token for every place, and for drafts of it one more.

        Finished at once, but for ``step_us``.
        """
        output = self._outputs.take(len(batch.sampled))
        if batch.num_drafts is not None:
            output = self._checked(batch, batch.num_drafts)
        if batch.sampling.num_logprobs is not None or batch.prompt_logprobs is not None:
            output = self._with_logprobs(batch, output)
        if not self._step_s:
            return _Done(output)
        self._end = max(self._end, time.monotonic()) + self._step_s
        return _Slow(output, self._end)

    def _checked(self, batch: Batch, num_drafts: IntArray) -> StepOutput:
        """Accept the drafts that are the one token, up to the first that is not."""
        width = int(num_drafts.max()) + 1
        place = np.arange(width - 1)
        first = batch.last_token_index - num_drafts + 1
        index = np.minimum(first[:, None] + place, batch.num_tokens - 1)
        right = (batch.token_ids[index] == self._token) & (place < num_drafts[:, None])
        accepted = np.logical_and.accumulate(right, axis=1).sum(axis=1)
        return StepOutput(
            token_ids=np.full((len(num_drafts), width), self._token, np.int32),
            num_tokens=(accepted + 1).astype(np.int32),
            finite=np.ones(len(num_drafts), np.bool_),
        )

    def describe(self) -> dict[str, str]:
        """Which token it gives."""
        return {"null": f"computes nothing; every token is {self._token}"}

    def close(self) -> None:
        """There is nothing to give back."""

    def _with_logprobs(self, batch: Batch, output: StepOutput) -> StepOutput:
        sampled = prompt = None
        if batch.sampling.num_logprobs is not None:
            chosen = np.full(len(batch.logit_index), self._token, np.int32)
            sampled = flat_logprobs(chosen, batch.sampling.num_logprobs, self._vocab_size)
        if batch.prompt_logprobs is not None:
            need = batch.prompt_logprobs
            prompt = flat_logprobs(need.target, need.num_logprobs, self._vocab_size)
        return StepOutput(
            token_ids=output.token_ids,
            num_tokens=output.num_tokens,
            finite=output.finite,
            logprobs=sampled,
            prompt_logprobs=prompt,
        )


class _Done:
    """A step that is over."""

    __slots__ = ("_output",)

    def __init__(self, output: StepOutput) -> None:
        self._output = output

    def result(self) -> StepOutput:
        return self._output


class _Slow:
    """A step that is over at a point in time, on ``time.monotonic``."""

    __slots__ = ("_end", "_output")

    def __init__(self, output: StepOutput, end: float) -> None:
        self._output = output
        self._end = end

    def result(self) -> StepOutput:
        time.sleep(max(0.0, self._end - time.monotonic()))
        return self._output


class _Constants:
    """One output per number of sampled rows, made when it is first needed."""

    def __init__(self, max_num_seqs: int, token: int) -> None:
        self._tokens = np.full((max_num_seqs, 1), token, np.int32)
        self._ones = np.ones(max_num_seqs, np.int32)
        self._finite = np.ones(max_num_seqs, np.bool_)
        for array in (self._tokens, self._ones, self._finite):
            array.flags.writeable = False
        self._made: dict[int, StepOutput] = {}

    def take(self, num_rows: int) -> StepOutput:
        output = self._made.get(num_rows)
        if output is None:
            output = StepOutput(
                token_ids=self._tokens[:num_rows],
                num_tokens=self._ones[:num_rows],
                finite=self._finite[:num_rows],
            )
            self._made[num_rows] = output
        return output


def _token(config: RunnerConfig, vocab_size: int) -> int:
    """The option, or the first token that does not end the text, so that requests run on."""
    if "token" in config.options:
        token = config.options["token"]
        if type(token) is not int or not 0 <= token < vocab_size:
            raise ConfigError(
                f"The option token must be an integer from 0 to {vocab_size - 1},"
                f" not {token!r:.80}."
            )
        return token
    ends = end_tokens(config.hf_config)
    return next((token for token in range(vocab_size) if token not in ends), 0)


def _probe() -> ProbeResult:
    return ProbeResult(usable=True, reason="computes nothing", num_devices=1)


PLUGIN = PlatformPlugin(api_version=API_VERSION, probe=_probe, create=NullPlatform)
