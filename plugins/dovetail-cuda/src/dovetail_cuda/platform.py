"""The CUDA platform: the shared GPU platform as NVIDIA's hardware has it."""

from __future__ import annotations

from importlib.metadata import version

import torch

from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.platform import Capabilities
from dovetail.platforms.gpu.platform import FEATURES, GpuPlatform
from dovetail_cuda.flash import FlashAttention2, FlashAttention3
from dovetail_cuda.flashinfer import FlashInferAttention
from dovetail_cuda.order import Capability, attention_order

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
        own = [kind(self.device, capability) for kind in _BACKENDS]
        return self.with_installed(own, attention_order(capability))

    def _capability(self) -> Capability | None:
        """Of the GPU; None if it is simulated."""
        if self.simulated:
            return None
        return torch.cuda.get_device_capability(self.device)
