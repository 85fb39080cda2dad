"""What platforms share whose devices torch calls ``cuda``: NVIDIA's GPUs and AMD's."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from torch import Tensor

from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.communicator import Communicator
from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.platform import Memory
from dovetail.core.contracts.runner import Runner, RunnerConfig
from dovetail.core.errors import ConfigError, PluginError, UnsupportedError
from dovetail.core.machine import look_at_machine
from dovetail.core.plugins.attention import BrokenBackend, installed_backends
from dovetail.platforms.gpu.communicator import DeviceCommunicator
from dovetail.platforms.gpu.queue import GpuQueue
from dovetail.platforms.torch.platform import TorchPlatform
from dovetail.platforms.torch.queue import DeviceQueue, HostQueue
from dovetail.platforms.torch.sampling.weights import Controls

__all__ = ["FEATURES", "GpuPlatform"]

_log = logging.getLogger(__name__)

FEATURES = frozenset(
    {
        "bad_words",
        "draft_model",
        "logits_processors",
        "prompt_logprobs",
        "quantization",
        "speculation",
        "structured_output",
        "transformers_models",
    }
)
"""What the shared runner does on a GPU."""

_SIMULATED_TOKENS, _SIMULATED_ROWS = 32, 2
"""Of a step, if nobody says otherwise: the interpreter takes milliseconds per token and layer."""


class GpuPlatform(TorchPlatform):
    """One GPU, its steps fed ahead of it and recorded as graphs, its small ops in Triton.

    A vendor's platform says its name, its capabilities and its order of attention backends.

    Args:
        simulated: There is no GPU: the host computes, and Triton's kernels are interpreted.

    Raises:
        PluginError: Torch finds no GPU, or kernels would not be interpreted.
    """

    origin: str
    """Package and version, for the report of ops."""

    def __init__(self, *, simulated: bool) -> None:
        self.simulated = simulated
        self.compiles_kernels = not simulated
        if simulated:
            self._simulate()
        elif not torch.cuda.is_available():
            raise PluginError(f"torch finds no GPU for platform {self.name}")
        else:
            self.device = torch.device("cuda", torch.cuda.current_device())

    def _simulate(self) -> None:
        from triton import knobs

        if not knobs.runtime.interpret:
            raise PluginError("kernels are interpreted only where TRITON_INTERPRET=1 is set")
        # The interpreter cuts bfloat16 off where GPUs round, and multiplies none of it.
        dtypes, kv_dtypes = (
            tuple(name for name in names if name != "bfloat16")
            for names in (self.capabilities.dtypes, self.capabilities.kv_dtypes)
        )
        self.capabilities = replace(
            self.capabilities,
            dtypes=dtypes,
            kv_dtypes=kv_dtypes,
            max_num_batched_tokens=_SIMULATED_TOKENS,
            max_num_seqs=_SIMULATED_ROWS,
        )
        _log.warning("platform %s is simulated on the CPU: right, and very slow", self.name)
        self.device = torch.device("cpu")

    def device_names(self) -> list[str]:
        """As the driver calls them."""
        if self.simulated:
            return ["no GPU, simulated on the CPU"]
        return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]

    def memory(self, device: int = 0) -> Memory:
        """Free memory counts what torch holds and could use again."""
        if self.simulated:
            machine = look_at_machine()
            return Memory(free=machine.memory_free // 2, total=machine.memory_total // 2)
        free, total = torch.cuda.mem_get_info(device)
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return Memory(free=free + kept, total=total)

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if not self.simulated:
            torch.cuda.synchronize(self.device)

    def queue(self) -> DeviceQueue:
        """The device's stream."""
        return HostQueue() if self.simulated else GpuQueue(self.device)

    def records_steps(self, config: RunnerConfig) -> bool:
        """Unless option ``graphs`` is "off"."""
        return bool(config.options.get("graphs", "on") == "on")

    def only_compiling(self) -> AbstractContextManager[None]:
        """Several kernels at a time."""
        from dovetail.platforms.gpu.compiling import only_compiling

        return only_compiling(self.device)

    def with_installed(
        self, own: Sequence[AttentionBackend], order: Sequence[str]
    ) -> list[AttentionBackend]:
        """The vendor's backends and the installed ones, preferred first.

        Args:
            own: Of the vendor's package. A name that an installed one has, too, is refused.
            order: Names; those that it lacks come after.
        """
        found: dict[str, AttentionBackend] = {backend.name: backend for backend in own}
        for backend in installed_backends("torch", self.device, order):
            if backend.name in found:
                why = f"{self.origin} and another package offer it"
                found[backend.name] = BrokenBackend(backend.name, why)
            else:
                found[backend.name] = backend
        place = {name: number for number, name in enumerate(order)}
        return sorted(found.values(), key=lambda backend: place.get(backend.name, len(place)))

    def override_ops(self, table: OpTable) -> None:
        """Triton's."""
        from dovetail.platforms.gpu.ops import override_ops

        override_ops(table, self.origin)

    def choose(
        self, logits_GV: Tensor, controls: Controls | None, *, restricts: bool = True
    ) -> tuple[Tensor, Tensor]:
        """In a few kernels."""
        from dovetail.platforms.gpu.ops.choice import choose

        return choose(logits_GV, controls, restricts=restricts)

    def communicator(self, rank: int, size: int, address: str) -> Communicator:
        """From device to device, member i on device i; simulated, through the host."""
        if self.simulated:
            return super().communicator(rank, size, address)
        if size > (count := torch.cuda.device_count()):
            raise UnsupportedError(
                f"{size} members need a GPU each; platform {self.name} has {count}"
            )
        return DeviceCommunicator(rank, size, address, torch.device("cuda", rank))

    def runner(self, config: RunnerConfig) -> Runner:
        """The shared runner. Option ``graphs``: "on" or "off", whether steps are recorded."""
        config.check_options(self.name, "graphs")
        if config.options.get("graphs", "on") not in ("on", "off"):
            raise ConfigError(f'graphs is {config.options["graphs"]!r:.40}: say "on" or "off".')
        return super().runner(config)
