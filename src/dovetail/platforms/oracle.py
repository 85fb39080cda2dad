"""A platform whose tokens prove that nothing was mixed up. Needs no torch.

There is no model: the next token is a hash of everything before it (``core/sampling/oracle.py``).
There is a KV cache, in which each slot holds its token and the hash of the prefix that ends there.
Every step reads it as attention would and compares it with what the row was given, so that a
block that is lost, another's, stale or written twice fails the request in the step that reads it,
with row and position.

Options (``RunnerConfig.options``): ``memory``, bytes for the KV cache; ``step_time``, seconds that
a step takes; ``end_rate``, how often a token is the end of the text; ``draft_quality``, how many
of the drafts it proposes are right.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

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
from dovetail.core.sampling.oracle import TokenRule
from dovetail.platforms.oracle_rows import OracleRows
from dovetail.platforms.pretend import (
    cache_plan,
    check_fit,
    end_tokens,
    number_option,
    positive_option,
    vocabulary,
)

__all__ = ["PLUGIN", "OraclePlatform", "OracleRunner"]

_BYTES_PER_POSITION = 1024
_DEFAULT_MEMORY = 1 << 28
_OPTIONS = ("memory", "step_time", "end_rate", "draft_quality")


class OraclePlatform(Platform):
    """No device at all. Chosen only when it is named."""

    name = "oracle"
    capabilities = Capabilities(
        family="oracle",
        dtypes=("float32", "bfloat16", "float16"),
        kv_dtypes=("auto", "float32", "bfloat16", "float16"),
        block_sizes=(16, 1, 2, 4, 8, 32, 64, 128, 256),
        features=frozenset({"prompt_logprobs", "deterministic", "speculation", "draft_model"}),
        async_steps=True,
        max_num_batched_tokens=2048,
        max_num_seqs=256,
    )

    def device_names(self) -> list[str]:
        """One, that only hashes."""
        return ["an oracle"]

    def memory(self, device: int = 0) -> Memory:
        """What the KV cache may pretend to take, unless the option says otherwise."""
        return Memory(free=_DEFAULT_MEMORY, total=_DEFAULT_MEMORY)

    def runner(self, config: RunnerConfig) -> Runner:
        """A runner. Raises ConfigError for a wrong option."""
        return OracleRunner(config)


class OracleRunner:
    """Hashes what it is given, and checks it.

    Raises:
        CheckpointError: The model's config has no ``vocab_size``.
        ConfigError: An option is unknown or out of range.
    """

    def __init__(self, config: RunnerConfig) -> None:
        options = config.options
        config.check_options("oracle", *_OPTIONS, "threads")
        ends = end_tokens(config.hf_config)
        self.rule = TokenRule(
            vocabulary(config.hf_config),
            ends[0] if ends else None,
            number_option(options, "end_rate", 0.0, 1.0),
        )
        self._config = config
        self._step_time = number_option(options, "step_time", 0.0, 3600.0)
        self._draft_quality = number_option(options, "draft_quality", 0.7, 1.0)
        self._free_at = 0.0
        self._cache = CacheSpec(
            bytes_per_block=config.block_size * _BYTES_PER_POSITION,
            bytes_available=positive_option(options, "memory", _DEFAULT_MEMORY),
        )

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
        """Make the cache of hashes. Raises OutOfMemoryError where a device of this size would."""
        check_fit(num_blocks, self._cache)
        self._rows = OracleRows(
            self.rule,
            num_blocks=num_blocks + 1,
            block_size=self._config.block_size,
            num_rows=self._config.max_num_seqs,
            max_len=self._config.max_model_len,
            draft_quality=self._draft_quality,
        )

    def warm_up(self) -> Iterator[WarmUp]:
        """There is nothing to compile."""
        return iter(())

    def step(self, batch: Batch) -> Pending:
        """Hashed at once; the result is there when the time of the step is over."""
        output = self._rows.step(batch)
        if not self._step_time:
            return _Done(output, 0.0)
        self._free_at = max(self._free_at, time.monotonic()) + self._step_time
        return _Done(output, self._free_at)

    def describe(self) -> dict[str, str]:
        """How the tokens come about."""
        return {"oracle": "no model; every token is a hash of those before it, and checked"}

    def close(self) -> None:
        """There is nothing to give back."""


class _Done:
    """A step that is over at a time of ``time.monotonic``."""

    __slots__ = ("_output", "_ready_at")

    def __init__(self, output: StepOutput, ready_at: float) -> None:
        self._output = output
        self._ready_at = ready_at

    def result(self) -> StepOutput:
        if self._ready_at:
            time.sleep(max(0.0, self._ready_at - time.monotonic()))
        return self._output


def _probe() -> ProbeResult:
    return ProbeResult(usable=True, reason="hashes in place of a model", num_devices=1)


PLUGIN = PlatformPlugin(api_version=API_VERSION, probe=_probe, create=OraclePlatform)
