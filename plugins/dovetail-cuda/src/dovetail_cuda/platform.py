"""The CUDA platform: the shared GPU platform as NVIDIA's hardware has it."""

from __future__ import annotations

from importlib.metadata import version

from dovetail.core.contracts.platform import Capabilities
from dovetail.platforms.gpu.platform import FEATURES, GpuPlatform

__all__ = ["CudaPlatform"]


class CudaPlatform(GpuPlatform):
    """An NVIDIA GPU."""

    name = "cuda"
    origin = f"dovetail-cuda {version('dovetail-cuda')}"
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
