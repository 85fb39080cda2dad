"""What platforms whose arrays are torch tensors share: a platform is its device and its choices."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeAlias

import torch

from dovetail.core.buckets import Buckets, doubling
from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.platform import Platform
from dovetail.core.contracts.runner import Runner, RunnerConfig
from dovetail.core.plugins.entries import AllowList
from dovetail.core.plugins.registry import Registry
from dovetail.platforms.torch.ops import DenseLinear

__all__ = ["BoundLinear", "TorchPlatform", "attention_registry"]

BoundLinear: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""A linear layer with its weight: (T, in) to (T, out)."""


class TorchPlatform(Platform):
    """Base of the torch platforms. The shared runner asks it for everything device-bound."""

    device: torch.device
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
            tokens=doubling(16, config.max_num_batched_tokens),
            blocks=doubling(4, most_blocks),
        )

    def override_ops(self, table: OpTable) -> None:
        """Enter this platform's own ops. Default: the references serve."""
        return

    def bind_linear(self, weight: torch.Tensor, bias: torch.Tensor | None) -> BoundLinear:
        """Repack the weight (out, in) and bias (out,) of a linear layer once, after loading."""
        return DenseLinear(weight, bias)

    def attention_backends(self) -> list[AttentionBackend]:
        """Every installed backend, in order of preference, made for this device."""
        registry = attention_registry()
        others = sorted(set(registry.names()) - set(self.attention_order))
        order = [name for name in self.attention_order if name in registry.names()]
        return [registry.load(name)(self.device) for name in [*order, *others]]

    def runner(self, config: RunnerConfig) -> Runner:
        """The runner that all torch platforms share."""
        from dovetail.platforms.torch.invariant import InvariantPlatform
        from dovetail.platforms.torch.runner import TorchRunner

        return TorchRunner(InvariantPlatform(self) if config.deterministic else self, config)


def attention_registry() -> Registry[Callable[[torch.device], AttentionBackend]]:
    """Attention backends that are installed and that ``DOVETAIL_PLUGINS`` admits."""

    def refuse(found: object) -> str | None:
        needed = ("refuses", "bytes_per_block", "allocate", "plan", "attend", "copy_blocks")
        missing = [name for name in needed if not callable(getattr(found, name, None))]
        return f"is no attention backend: it lacks {', '.join(missing)}" if missing else None

    return Registry(
        "dovetail.attention_backends",
        "attention backend",
        refuse,
        allowed=AllowList.from_environ(os.environ),
    )
