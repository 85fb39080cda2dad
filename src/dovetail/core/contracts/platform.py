"""The platform contract: how one kind of hardware describes itself and makes a runner.

A distribution offers a platform through the entry-point group ``dovetail.platforms``; the entry
point names a :class:`PlatformPlugin`. Finding and probing it must import no framework.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dovetail.core.errors import UnsupportedError

if TYPE_CHECKING:  # Not even numpy is loaded for a probe.
    from dovetail.core.contracts.attention import AttentionBackend
    from dovetail.core.contracts.communicator import Communicator
    from dovetail.core.contracts.runner import Runner, RunnerConfig
    from dovetail.core.contracts.workbench import Activity, Workbench

__all__ = [
    "API_VERSION",
    "Adjustment",
    "Capabilities",
    "FEATURES",
    "Memory",
    "Platform",
    "PlatformPlugin",
    "ProbeResult",
    "Rates",
]

API_VERSION = 1
"""Version of this contract. A plug-in that names another one is refused, with both numbers."""


FEATURES = frozenset(
    {
        "bad_words",
        "deterministic",
        "draft_model",
        "logits_processors",
        "prompt_logprobs",
        "quantization",
        "speculation",
        "structured_output",
        "tensor_parallel",
        "transformers_models",
    }
)
"""Every name that ``Capabilities.features`` may hold."""


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """Whether the hardware is there and usable."""

    usable: bool
    reason: str
    """What was found, or what is missing and how to get it. One line."""
    num_devices: int = 0


@dataclass(frozen=True, kw_only=True)
class Capabilities:
    """What a platform can do. Frozen data: the core reads it and never asks for a brand."""

    family: str
    """Which arrays and op references apply: ``torch``, ``jax``, or the vendor's own name."""
    dtypes: tuple[str, ...]
    """Weight and activation dtypes, preferred first."""
    kv_dtypes: tuple[str, ...]
    """KV cache dtypes, preferred first; ``auto`` is the activation dtype."""
    slow_dtypes: frozenset[str] = frozenset()
    """Those of ``dtypes`` in which it is far slower than in the preferred one, which ``auto`` takes
    in their place."""
    block_sizes: tuple[int, ...]
    """Positions per KV block, preferred first."""
    features: frozenset[str] = frozenset()
    """Optional abilities: ``transformers_models``, ``prompt_logprobs``, ``deterministic``,
    ``structured_output`` (``SamplingBatch.masks`` are honoured), ``bad_words``,
    ``logits_processors``, ``quantization`` (the runner binds layers of any ``QuantScheme``),
    ``speculation`` (steps check drafts), ``draft_model`` (the runner can
    have one), ``tensor_parallel`` (``RunnerConfig.tensor_parallel_size`` may be above 1). What a
    request asks for and the platform does not have is refused before it reaches the runner."""
    static_shapes: bool = False
    """Every new shape costs a compilation: steps are padded to a few sizes (``core/buckets.py``),
    and after the warm-up no new one may appear."""
    mixed_batches: bool = True
    """Prefill and decode may share a step."""
    async_steps: bool = False
    """``Runner.step`` returns before the work is done, so that the host may run one step ahead."""
    graphs: bool = False
    """Steps can be captured once and replayed."""
    max_num_batched_tokens: int = 2048
    """Default token budget of a step."""
    max_num_seqs: int = 256
    """Default limit on running requests."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of one device."""

    free: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What one device was measured to do when it was asked, with nothing in its way."""

    read_bytes_per_second: float
    """From its memory."""
    matrix_flops_per_second: float
    """Of a large matrix product; a multiplication and an addition are two."""


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """A setting that the platform needs. The core applies it and prints the reason."""

    field: str
    value: Any
    reason: str


class Platform(ABC):
    """One kind of hardware, ready for use in this process. Made by ``PlatformPlugin.create``."""

    name: str
    capabilities: Capabilities

    @abstractmethod
    def device_names(self) -> list[str]:
        """Readable name of each device, such as ``AMD EPYC 9755, 2 cores``."""

    @abstractmethod
    def memory(self, device: int = 0) -> Memory:
        """Memory of a device now."""

    @abstractmethod
    def runner(self, config: RunnerConfig) -> Runner:
        """A runner with nothing loaded. Raises UserError if the config cannot be served."""

    def attention_backends(self) -> list[AttentionBackend]:
        """Every installed backend that works on this platform's arrays, in order of preference.

        Default: none, for platforms that do not attend.
        """
        return []

    def workbench(self) -> Workbench:
        """The platform taken apart. Default: raises UnsupportedError, saying that it has none."""
        raise UnsupportedError(f"platform {self.name} has no ops to look at one by one")

    def watch(self) -> AbstractContextManager[Activity]:
        """Count what this thread has the device do, until the context ends.

        Default: raises UnsupportedError, saying that nothing is counted.
        """
        raise UnsupportedError(f"platform {self.name} does not count what its device does")

    def rates(self, dtype: str) -> Rates:
        """Measure the device now, in about a second; nothing else may run on it meanwhile.

        Default: raises UnsupportedError, saying that it is not measured.

        Args:
            dtype: Of the matrices, one of ``Capabilities.dtypes``.

        Raises:
            OutOfMemoryError: There is no room for the arrays that are measured with.
        """
        raise UnsupportedError(f"platform {self.name} does not measure its device")

    def communicator(self, rank: int, size: int, address: str) -> Communicator:
        """Join a group of ``size`` processes; returns when all are there.

        Default: raises UnsupportedError, saying that there are no collectives.

        Args:
            rank: Of this process, from 0.
            size: Of the group.
            address: A path for a file that the members share, the same for all, not yet there.
        """
        raise UnsupportedError(f"platform {self.name} has no collectives between processes")

    def adjust(self, settings: Mapping[str, Any]) -> list[Adjustment]:
        """Changes that this platform needs to the resolved settings. Default: none."""
        return []

    def synchronize(self) -> None:
        """Wait for all work given to the device. Default: steps are synchronous, nothing to do."""
        return


@dataclass(frozen=True, kw_only=True)
class PlatformPlugin:
    """What the entry point names. Importing its module must be cheap and import no framework."""

    api_version: int
    """The :data:`API_VERSION` that the plug-in was written for, as a number of its own: the name
    would always be that of the Dovetail which is installed."""
    probe: Callable[[], ProbeResult]
    """Standard library only, below a second, no side effects. Runs in a child process."""
    create: Callable[[], Platform]
    """May import the vendor's stack. Runs in the engine process only."""
    priority: int | None = None
    """The usable platform with the highest priority is chosen; None: only when it is named."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Variables that must be set before the engine process starts."""
