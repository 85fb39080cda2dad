"""The oracle: plain torch on the CPU, nothing overridden, the readable attention first."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import TYPE_CHECKING

from dovetail.core.contracts.platform import API_VERSION, PlatformPlugin, ProbeResult

if TYPE_CHECKING:
    from dovetail.core.contracts.platform import Platform

__all__ = ["PLUGIN"]


def _probe() -> ProbeResult:
    if find_spec("torch") is None:
        return ProbeResult(usable=False, reason="torch is not installed: pip install torch")
    return ProbeResult(usable=True, reason="plain torch on the CPU, to compare with", num_devices=1)


def _create() -> Platform:
    import torch

    from dovetail.core.contracts.platform import Capabilities, Memory
    from dovetail.platforms.torch.platform import TorchPlatform

    class ReferencePlatform(TorchPlatform):
        name = "reference"
        device = torch.device("cpu")
        attention_order = ("reference", "sdpa")
        capabilities = Capabilities(
            family="torch",
            dtypes=("float32", "bfloat16", "float16"),
            kv_dtypes=("auto", "float32", "bfloat16", "float16", "int8", "fp8_e4m3", "fp8_e5m2"),
            block_sizes=(16, 1, 2, 4, 8, 32, 64, 128),
            features=frozenset(
                {
                    "bad_words",
                    "logits_processors",
                    "prompt_logprobs",
                    "quantization",
                    "structured_output",
                    "transformers_models",
                    "speculation",
                    "draft_model",
                }
            ),
            max_num_seqs=64,
        )

        def device_names(self) -> list[str]:
            return [f"the CPU, {torch.get_num_threads()} threads"]

        def memory(self, device: int = 0) -> Memory:
            page = os.sysconf("SC_PAGE_SIZE")
            total = os.sysconf("SC_PHYS_PAGES") * page
            return Memory(free=os.sysconf("SC_AVPHYS_PAGES") * page // 2, total=total)

    return ReferencePlatform()


PLUGIN = PlatformPlugin(api_version=API_VERSION, probe=_probe, create=_create)
