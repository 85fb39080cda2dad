"""The CUDA platform: the shared GPU platform as NVIDIA's hardware has it."""

from __future__ import annotations

from importlib.metadata import version

import torch

from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.platform import Capabilities
from dovetail.core.plugins.attention import BrokenBackend, installed_backends
from dovetail.platforms.gpu.platform import FEATURES, GpuPlatform
from dovetail_cuda.flash import FlashAttention2, FlashAttention3
from dovetail_cuda.flashinfer import FlashInferAttention
from dovetail_cuda.order import attention_order
from dovetail_cuda.pages import Capability

__all__ = ["CudaPlatform"]

_BACKENDS = (FlashInferAttention, FlashAttention3, FlashAttention2)


class CudaPlatform(GpuPlatform):
    """An NVIDIA GPU."""

    name = "cuda"
    origin = f"dovetail-cuda {version('dovetail-cuda')}"
    capabilities = Capabilities(
        family="torch",
        dtypes=("bfloat16", "float16", "float32"),
        kv_dtypes=("auto", "bfloat16", "float16", "float32", "fp8_e4m3", "fp8_e5m2", "int8"),
        block_sizes=(16, 32, 64, 128, 8, 256),
        features=FEATURES,
        async_steps=True,
        graphs=True,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
    )

    def attention_backends(self) -> list[AttentionBackend]:
        """Those of this package and the installed ones, in the order for this GPU."""
        capability = self._capability()
        order = attention_order(capability)
        found: dict[str, AttentionBackend] = {
            kind.name: kind(self.device, capability) for kind in _BACKENDS
        }
        for backend in installed_backends("torch", self.device, order):
            if backend.name in found:
                why = f"{self.origin} and another package offer it"
                found[backend.name] = BrokenBackend(backend.name, why)
            else:
                found[backend.name] = backend
        place = {name: number for number, name in enumerate(order)}
        return sorted(found.values(), key=lambda backend: place.get(backend.name, len(place)))

    def _capability(self) -> Capability | None:
        """Of the GPU; None if it is simulated."""
        if self.simulated:
            return None
        return torch.cuda.get_device_capability(self.device)
