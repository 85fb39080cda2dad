"""FlashAttention's and FlashInfer's documented interfaces over plain torch, on any device.

The parameters are theirs, name by name and in their order, and so are the demands on tensors that
their documentation and their checks make. Everything is computed the plain way, in float32.
"""

from __future__ import annotations

from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from emulated_cuda import flash, infer

__all__ = ["MODULES"]


def module(name: str, **members: Any) -> ModuleType:
    made = ModuleType(name)
    made.__spec__ = ModuleSpec(name, None)  # others look for what is installed, too
    vars(made).update(members)
    return made


MODULES = (
    module("flash_attn_interface", flash_attn_with_kvcache=flash.flash3_with_kvcache),
    module(
        "flash_attn",
        flash_attn_with_kvcache=flash.flash2_with_kvcache,
        flash_attn_varlen_func=flash.flash2_varlen_func,
    ),
    module(
        "flashinfer",
        BatchDecodeWithPagedKVCacheWrapper=infer.BatchDecodeWithPagedKVCacheWrapper,
        BatchPrefillWithPagedKVCacheWrapper=infer.BatchPrefillWithPagedKVCacheWrapper,
    ),
)
"""Each as it is imported."""
