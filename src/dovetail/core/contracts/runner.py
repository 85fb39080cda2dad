"""The runner contract: all that the engine sees of a device. Numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.errors import ConfigError

__all__ = ["CacheSpec", "ModelImpl", "Pending", "Runner", "RunnerConfig", "RunnerPlan", "WarmUp"]

ModelImpl = Literal["native", "transformers"]


@dataclass(frozen=True, kw_only=True)
class RunnerConfig:
    """Everything a runner needs to know; decided by ``config.resolve``, changed by nobody."""

    model_path: Path
    hf_config: dict[str, Any]
    """The checkpoint's ``config.json`` (the text model's part of it)."""
    model_impl: ModelImpl
    load_format: Literal["safetensors", "dummy"]
    dtype: str
    kv_dtype: str
    block_size: int
    """Positions per KV block."""
    max_model_len: int
    """The most tokens in one sequence, prompt and answer."""
    max_num_seqs: int
    """Rows: the most requests in one step."""
    max_num_batched_tokens: int
    """The most tokens in one step."""
    attention_backend: str | None = None
    """The backend that the user insists on; None leaves the choice to the platform's order."""
    quantization: str | None = None
    deterministic: bool = False
    """Logits of a row are the same bits in every step that could compute them."""
    seed: int = 0
    """Seed for dummy weights."""
    trust_remote_code: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    """Settings of the platform's own, by name."""
    tensor_parallel_size: int = 1
    """Devices that share every layer."""
    max_drafts: int = 0
    """The most drafts of one row in a step (``Batch.num_drafts``)."""
    draft: RunnerConfig | None = None
    """The draft model, if the runner is to have one: it proposes what ``Batch.num_drafts_wanted``
    asks for, and keeps its KV in blocks of the same numbers. Its logits may be of another width."""

    def check_options(self, platform: str, *known: str) -> None:
        """Raises ConfigError for an option that the platform does not have."""
        unknown = sorted(set(self.options) - set(known))
        if unknown:
            has = f"it has: {', '.join(known)}" if known else "it has none"
            raise ConfigError(f"The {platform} platform has no option {unknown[0]!r}; {has}.")


@dataclass(frozen=True, kw_only=True)
class RunnerPlan:
    """What serving would take, as far as it is known before weights are read. Of one device."""

    weight_bytes: int
    step_bytes: int
    """The most that a step holds beside weights and cache; an upper bound."""
    bytes_per_block: int
    """As ``CacheSpec.bytes_per_block``."""
    window: int | None
    """As ``CacheSpec.window``."""
    choices: Mapping[str, str]
    """What was chosen and why, by topic, as ``Runner.describe`` will have it."""


@dataclass(frozen=True, kw_only=True)
class CacheSpec:
    """What KV blocks cost and how many fit."""

    bytes_per_block: int
    """Of all layers together."""
    bytes_available: int
    """Free memory of the device, less what the largest step needs beside the cache."""
    window: int | None = None
    """No layer attends to more than this many positions, its own included: blocks before them are
    given to others, and block 0 stands for them in the tables. None: some layer attends to all."""


@dataclass(frozen=True, kw_only=True)
class WarmUp:
    """One finished part of the warm-up, for the progress bar."""

    name: str
    seconds: float
    num_parts: int = 0
    """Of the whole warm-up; 0: not known."""


class Pending(Protocol):
    """A step that was started."""

    def result(self) -> StepOutput:
        """Wait for the step and return what it produced. Raises what the step raised."""
        ...


class Runner(Protocol):
    """Runs steps of one model on one device (or one group that acts as one).

    Order of calls: perhaps ``plan``, then ``load``, ``cache_spec``, ``allocate``, ``warm_up``, then
    ``step`` any number of times. Steps run in the order given.
    """

    def plan(self) -> RunnerPlan:
        """What loading would choose and take, from the config alone: no weights are read.

        Raises:
            UserError: The config cannot be served, as ``load`` would say, or nothing can be known
                before the weights are read.
        """
        ...

    def load(self) -> Iterator[tuple[int, int]]:
        """Read the weights; yields (bytes done, bytes in all) for the progress bar.

        Raises:
            CheckpointError: A tensor is missing, unknown or of the wrong shape; names it.
            OutOfMemoryError: The weights do not fit.
        """
        ...

    def cache_spec(self) -> CacheSpec:
        """Cost of a block and the memory that is left for blocks."""
        ...

    def allocate(self, num_blocks: int) -> None:
        """Make the KV cache: blocks 1 to ``num_blocks``, and block 0, which only pads.

        Raises:
            OutOfMemoryError: It does not fit.
        """
        ...

    def warm_up(self) -> Iterator[WarmUp]:
        """Compile or capture what will be needed; afterwards no new shape may cost time."""
        ...

    def step(self, batch: Batch) -> Pending:
        """Start a step. May return before the work is done (``Capabilities.async_steps``)."""
        ...

    def describe(self) -> dict[str, str]:
        """What was chosen and why, for the start-up banner: ``{"attention": "sdpa: ..."}``."""
        ...

    def close(self) -> None:
        """Give the device's memory back. The runner cannot be used afterwards."""
        ...
