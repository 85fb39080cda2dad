"""The ROCm platform: the shared GPU platform as AMD's hardware has it."""

from __future__ import annotations

from importlib.metadata import version

import torch

from dovetail.core.contracts.attention import AttentionBackend
from dovetail.core.contracts.platform import Capabilities
from dovetail.platforms.gpu.platform import FEATURES, GpuPlatform
from dovetail_rocm.aiter import AiterAttention

__all__ = ["RocmPlatform"]


class RocmPlatform(GpuPlatform):
    """An AMD GPU: HIP graphs and RCCL come with AMD's build of torch, under CUDA's names."""

    name = "rocm"
    origin = f"dovetail-rocm {version('dovetail-rocm')}"
    # Under vLLM, AITER gives 1.08 to 1.36 times the tokens per second of its Triton kernels (MI300X
    # to MI355X; vLLM blog, 27 February 2026). Here it stands behind, for it has not run on a GPU.
    attention_order = ("triton", "aiter", "sdpa", "reference")
    capabilities = Capabilities(
        family="torch",
        dtypes=("bfloat16", "float16", "float32"),
        kv_dtypes=("auto", "bfloat16", "float16", "float32", "fp8_e4m3", "fp8_e5m2", "int8"),
        block_sizes=(16, 32, 64, 128, 8),
        features=FEATURES,
        async_steps=True,
        graphs=True,
        max_num_batched_tokens=8192,
        max_num_seqs=256,
    )

    def attention_backends(self) -> list[AttentionBackend]:
        """That of this package and the installed ones."""
        own = AiterAttention(self.device, self._target(), torch.version.hip)
        return self.with_installed([own], self.attention_order)

    def _target(self) -> str | None:
        """The GPU's instruction set; None if it is simulated."""
        if self.simulated:
            return None
        name: str = torch.cuda.get_device_properties(self.device).gcnArchName
        return name.partition(":")[0]
