"""The Acme platform: two ops and an attention backend of its own, on the shared torch runner."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.platform import Adjustment, Capabilities, Memory
from dovetail.platforms.torch.platform import TorchPlatform

__all__ = ["AcmePlatform"]

_MEMORY = 1 << 30
_ORIGIN = "dovetail-acme 3.1.4"


class AcmePlatform(TorchPlatform):
    """One card with a gigabyte."""

    name = "acme"
    device = torch.device("cpu")
    attention_order = ("acme-slots", "reference")
    capabilities = Capabilities(
        family="torch",
        dtypes=("float32", "bfloat16"),
        kv_dtypes=("auto", "float32", "bfloat16"),
        block_sizes=(8, 16),
        features=frozenset({"prompt_logprobs", "structured_output", "speculation"}),
        max_num_batched_tokens=512,
        max_num_seqs=16,
    )

    def __init__(self) -> None:
        if os.environ.get("ACME_VISIBLE_CARDS") != "0":
            raise RuntimeError("the variables of the platform were not set before it was made")

    def device_names(self) -> list[str]:
        """The one card."""
        return ["Acme A1"]

    def memory(self, device: int = 0) -> Memory:
        """A gigabyte, always."""
        return Memory(free=_MEMORY, total=_MEMORY)

    def override_ops(self, table: OpTable) -> None:
        """Two ops."""
        table.override("rms_norm", _rms_norm, origin=_ORIGIN)
        table.override("silu_and_mul", _silu_and_mul, origin=_ORIGIN)

    def adjust(self, settings: Mapping[str, Any]) -> list[Adjustment]:
        """The card wants few requests at once."""
        reason = "the Acme A1 has eight lanes"
        few = min(settings["max_num_seqs"], 8)
        return [Adjustment(field="max_num_seqs", value=few, reason=reason)]


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * weight.float()).to(x.dtype)


def _silu_and_mul(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up
