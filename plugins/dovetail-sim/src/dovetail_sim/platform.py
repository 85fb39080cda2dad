"""The platform: what the simulated accelerator can do, and the parts that are its own."""

from __future__ import annotations

from importlib.metadata import version

import torch
from torch import Tensor
from torch.nn import functional

from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.platform import Capabilities, Memory
from dovetail.platforms.torch.platform import BoundLinear, TorchPlatform
from dovetail_sim.attention import BLOCK_SIZES, SimAttention
from dovetail_sim.device import NAME, hardware

__all__ = ["SimPlatform"]


class SimPlatform(TorchPlatform):
    """An accelerator that compiles every shape, with memory of its own and a matrix unit.

    Raises:
        UnsupportedError: Torch cannot have the device in this process.
    """

    name = "sim"
    capabilities = Capabilities(
        family="torch",
        dtypes=("float32", "bfloat16", "float16"),
        kv_dtypes=("auto", "float32", "bfloat16", "float16"),
        block_sizes=BLOCK_SIZES,
        features=frozenset(
            {
                "bad_words",
                "logits_processors",
                "prompt_logprobs",
                "quantization",
                "speculation",
                "structured_output",
            }
        ),
        static_shapes=True,
        mixed_batches=False,
        max_num_batched_tokens=256,
        max_num_seqs=8,
    )

    def __init__(self) -> None:
        self._hardware = hardware()
        self.device = torch.device(NAME, 0)

    def device_names(self) -> list[str]:
        """One line for each."""
        return [f"simulated accelerator {index}" for index in range(self._hardware.num_devices)]

    def memory(self, device: int = 0) -> Memory:
        """As the device counts it."""
        used = self._hardware.memory[device].used
        return Memory(free=self._hardware.limit - used, total=self._hardware.limit)

    def synchronize(self) -> None:
        """Wait for copies that have not arrived; everything else is done on return."""
        self._hardware.synchronize()

    def attention_backends(self) -> list[AttentionBackend]:
        """Its own alone: the portable ones have shapes that depend on the rows' lengths."""
        return [SimAttention(self.device)]

    def bind_linear(self, weight: Tensor, bias: Tensor | None) -> BoundLinear:
        """As the matrix unit reads it."""
        return _MatrixUnitLinear(weight, bias)

    def override_ops(self, table: OpTable) -> None:
        """Norms that are one kernel each."""
        origin = f"dovetail-sim {version('dovetail-sim')}"
        table.override("rms_norm", _rms_norm, origin=origin)
        table.override("add_rms_norm", _add_rms_norm, origin=origin)


class _MatrixUnitLinear:
    """``x @ W.T + b`` with W stored as (in, out), which the matrix unit reads row by row."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self.weight = weight.T.contiguous()
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        return x @ self.weight if self.bias is None else x @ self.weight + self.bias


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    normed = functional.rms_norm(x.float(), x.shape[-1:], eps=eps)
    return (weight * normed.to(weight.dtype)).to(x.dtype)


def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return _rms_norm(total, weight, eps), total
