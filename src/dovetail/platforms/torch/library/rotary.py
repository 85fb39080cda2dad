"""Rotary frequencies that the library would choose anew in every step, made the same for all steps.

The library looks at the highest position of a forward call. A step of ours holds sequences of all
lengths, and the keys of earlier steps must stay valid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from dovetail.core.errors import UnsupportedError

__all__ = ["pin_rotary"]


def pin_rotary(model: nn.Module, max_model_len: int) -> None:
    """Fix the frequencies of every rotary module, as the native models do.

    LongRoPE takes its long factors for all sequences if ``max_model_len`` goes beyond the original
    context, else its short ones. Dynamic scaling does nothing within the original context.

    Raises:
        UnsupportedError: Frequencies that differ by position at this ``max_model_len``.
    """
    for module in model.modules():
        kind = getattr(module, "rope_type", None)
        if isinstance(kind, Mapping) and any(map(_varies, kind.values())):
            raise UnsupportedError(f"its layers differ in their rotary scaling: {dict(kind)}")
        if _varies(kind):
            _pin(module, max_model_len)


def _varies(kind: object) -> bool:
    """As the library's ``dynamic_rope_update`` tells."""
    return kind == "longrope" or "dynamic" in str(kind)


def _pin(module: Any, max_model_len: int) -> None:
    config = module.config
    is_long = module.rope_type == "longrope"
    original = config.max_position_embeddings
    if is_long:
        original = config.rope_parameters["original_max_position_embeddings"]
    if max_model_len > original:
        if not is_long or "long_mscale" in config.rope_parameters:
            raise UnsupportedError(
                "its rotary scaling depends on the longest sequence of a step, which holds many;"
                f" --max-model-len {original} or less leaves it as it is"
            )
        make: Callable[..., Any] = ROPE_INIT_FUNCTIONS["longrope"]
        frequencies, _ = make(config, module.inv_freq.device, seq_len=max_model_len)
        module.inv_freq.copy_(frequencies)
    module.rope_type = "default"
