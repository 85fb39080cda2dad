"""What platforms whose arrays are torch tensors share: a platform is its device and its choices."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from dovetail.core.batch import SamplingBatch
from dovetail.core.buckets import Buckets, doubling
from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.communicator import Communicator
from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.platform import Platform, Rates
from dovetail.core.contracts.runner import Runner, RunnerConfig
from dovetail.core.contracts.workbench import Activity, Workbench
from dovetail.core.plugins.attention import installed_backends
from dovetail.platforms.torch.dtypes import from_numpy
from dovetail.platforms.torch.kept import KeptLayers
from dovetail.platforms.torch.ops import DenseLinear
from dovetail.platforms.torch.queue import DeviceQueue
from dovetail.platforms.torch.sampling.choice import choose
from dovetail.platforms.torch.sampling.fixed import choose_fixed
from dovetail.platforms.torch.sampling.rows import Rows, Which
from dovetail.platforms.torch.sampling.weights import Controls
from dovetail.platforms.torch.weight_uploads import WeightUploads

if TYPE_CHECKING:
    from dovetail.platforms.torch.loading import RunnableModel

__all__ = ["BoundLinear", "TorchPlatform"]

BoundLinear: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""A linear layer with its weight: (T, in) to (T, out)."""


class TorchPlatform(Platform):
    """Base of the torch platforms. The shared runner asks it for everything device-bound."""

    device: torch.device
    compiles_kernels: bool = False
    """Kernels are compiled for a model's sizes when they first run, which takes seconds."""
    attention_order: tuple[str, ...] = ("sdpa", "reference")
    """Attention backends, preferred first; those of other packages come after, by name."""

    @property
    def sampling_device(self) -> torch.device:
        """Where tokens are chosen: the device, or the host where shapes are static.

        Choosing them exactly has shapes that depend on the logits.
        """
        return torch.device("cpu") if self.capabilities.static_shapes else self.device

    def buckets(self, config: RunnerConfig) -> Buckets:
        """The sizes of steps, where shapes are static. Default: each twice the one before."""
        most_blocks = -(-config.max_model_len // config.block_size)
        return Buckets(
            decode=doubling(1, config.max_num_seqs),
            tokens=doubling(32, config.max_num_batched_tokens),
            blocks=doubling(8, most_blocks),
        )

    def queue(self) -> DeviceQueue | None:
        """What works off the steps while the host goes on. Default: none, each op is waited for."""
        return None

    def records_steps(self, config: RunnerConfig) -> bool:
        """Whether the queue is to record steps. Default: if it can."""
        return self.capabilities.graphs

    def choose(
        self, logits_GV: torch.Tensor, controls: Controls | None, *, restricts: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As ``ChooseFixed``, for steps that a queue works off.

        The tokens are those that ``Sampler`` would choose.
        """
        return choose_fixed(logits_GV, controls, restricts=restricts)

    def choose_rows(
        self, rows: Rows, which: Which, sampling: SamplingBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A ``Choose``, for the other steps, where tokens are chosen on the device."""
        return choose(rows, which, sampling)

    def prepared(self, model: RunnableModel) -> RunnableModel:
        """What runs a loaded model, its attention bound. Default: it does."""
        return model

    def uploader(self) -> Callable[[np.ndarray[Any, Any]], torch.Tensor]:
        """How weights come to the device. Default: in pieces, if it has a queue."""
        queue = self.queue()
        if queue is None:
            return lambda array: from_numpy(array).to(self.device)
        return WeightUploads(queue, self.device)

    def override_ops(self, table: OpTable) -> None:
        """Enter this platform's own ops. Default: the references serve."""
        return

    def only_compiling(self) -> AbstractContextManager[None]:
        """Until the context ends, this thread's steps compile kernels, and compute nothing.

        Where ``compiles_kernels``. Default: they compute, and kernels are compiled one by one.
        """
        return nullcontext()

    def bind_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> BoundLinear:
        """Repack the weight (out, in) and bias (out,) of a linear layer once, after loading."""
        return DenseLinear(weight, bias)

    def bind_rows(self, weights: Sequence[torch.Tensor], bias: torch.Tensor | None) -> BoundLinear:
        """As ``bind_linear``, of a weight in pieces that lie one below the other: (out_i, in).

        Default: puts them together, which takes memory for as long as the layer is bound.
        """
        whole = weights[0] if len(weights) == 1 else torch.cat(list(weights))
        return self.bind_linear(whole, bias)

    def kept_layers(self, config: RunnerConfig) -> KeptLayers | None:
        """Linear layers that an earlier start has bound, and where this one's go. Default: none."""
        return None

    def attention_backends(self) -> list[AttentionBackend]:
        """Every installed backend, in order of preference, made for this device."""
        return installed_backends("torch", self.device, self.attention_order)

    def workbench(self) -> Workbench:
        """Its ops and layers, over tensors on its device."""
        from dovetail.platforms.torch.workbench import TorchWorkbench

        return TorchWorkbench(self)

    def watch(self) -> AbstractContextManager[Activity]:
        """Count copies between devices, and the ops on this one by their shapes."""
        from dovetail.platforms.torch.watch import watch

        return watch(self.device)

    def rates(self, dtype: str) -> Rates:
        """Large reads, copies and matrix products, timed on the device."""
        from dovetail.platforms.torch.rates import measure_rates

        return measure_rates(self, dtype)

    def communicator(self, rank: int, size: int, address: str) -> Communicator:
        """Collectives over gloo, through the host: right for every device, fast on none."""
        from dovetail.platforms.torch.communicator import HostCommunicator

        return HostCommunicator(rank, size, address)

    def runner(self, config: RunnerConfig) -> Runner:
        """The runner that all torch platforms share."""
        from dovetail.platforms.torch.invariant import InvariantPlatform
        from dovetail.platforms.torch.runner import TorchRunner

        return TorchRunner(InvariantPlatform(self) if config.deterministic else self, config)
