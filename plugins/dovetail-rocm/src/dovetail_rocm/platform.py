"""The ROCm platform: the shared GPU platform as AMD's hardware has it."""

from __future__ import annotations

from importlib.metadata import version

from dovetail.core.contracts.platform import Capabilities
from dovetail.platforms.gpu.platform import FEATURES, GpuPlatform

__all__ = ["RocmPlatform"]


class RocmPlatform(GpuPlatform):
    """An AMD GPU: HIP graphs and RCCL come with AMD's build of torch, under CUDA's names."""

    name = "rocm"
    origin = f"dovetail-rocm {version('dovetail-rocm')}"
    attention_order = ("triton", "sdpa", "reference")
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
