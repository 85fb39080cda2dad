"""Models of the library that are not written for attention from elsewhere.

They hand no keyword arguments down, but they do hand down the KV cache: there the step travels.
Most compute their attention themselves, instead of calling the library's interface: the modules
that do get a forward of ours, over their own projections.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from dovetail.core.errors import UnsupportedError
from dovetail.platforms.torch.library.attention import Step, Way

__all__ = ["ARCHITECTURES", "BY_CACHE", "adapt", "register_older"]

ARCHITECTURES = (
    "BloomForCausalLM",
    "CodeGenForCausalLM",
    "FalconForCausalLM",
    "GPTJForCausalLM",
    "MptForCausalLM",
    "NemotronForCausalLM",
    "StableLmForCausalLM",
)
_NAME = "dovetail_older"
"""Our attention for them. Its mask is empty, and nobody looks at it."""


class _StepAsCache:
    """A step in the place of the library's KV cache, which is empty before every step."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens before this step's: none that the library need know of."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Keys, and the position of the first."""
        return query_length, 0

    def get_query_offset(self, layer_idx: int) -> int:
        """The position of the first query."""
        return 0

    def update(self, key: Tensor, value: Tensor, layer_idx: int) -> tuple[_Keys, Tensor]:
        """The same keys and values, the keys with the step: what attends is given nothing else."""
        return _Keys(self.step, key), value


class _Keys:
    """Keys (1, K, T, E) on their way from ``update`` to what attends."""

    def __init__(self, step: Step, key: Tensor) -> None:
        self.step = step
        self.key = key


BY_CACHE = Way(attention=_NAME, carry=lambda step: {"past_key_values": _StepAsCache(step)})
"""In the place of the KV cache."""


def register_older() -> None:
    """Enter the attention and the empty mask among the library's. May be called again."""
    AttentionInterface.register(_NAME, _interface)
    AttentionMaskInterface.register(_NAME, _no_mask)


def adapt(model: Any) -> None:
    """Replace what attends in every layer.

    Args:
        model: One of ``ARCHITECTURES``, made with the library's eager attention.

    Raises:
        UnsupportedError: A setting that the replacement does not honour.
    """
    model.config._attn_implementation = _NAME
    for module in model.modules():
        adapter = _ADAPTERS.get(type(module).__name__)
        if adapter is not None:
            adapter(module, model.config)


def _no_mask(*, device: torch.device, **unused: Any) -> Tensor:
    return torch.empty(0, dtype=torch.bool, device=device)


def _interface(
    module: nn.Module, query: Tensor, keys: _Keys, value: Tensor, *unused: Any, **asked: Any
) -> tuple[Tensor, None]:
    return keys.step.attend(module, query, keys.key, value, asked), None


def _attend(layer: Any, cache: _StepAsCache, asked: Mapping[str, Any], *qkv: Tensor) -> Tensor:
    """Attend with (1, heads, T, E) each, and merge the heads: (1, T, D)."""
    query, key, value = qkv
    return cache.step.attend(layer, query, key, value, asked).flatten(2)


def _adapt_falcon(module: Any, config: Any) -> None:
    asked: dict[str, Any] = {"scaling": module.inv_norm_factor}
    if config.alibi:
        # The model's slopes are those of bfloat16, and the scale applies to them as well.
        slopes = torch.tensor(_slopes(module.num_heads)).bfloat16().float()
        asked["alibi_slopes"] = tuple((slopes * module.inv_norm_factor).tolist())
    module.forward = partial(_falcon, module, asked)


def _falcon(
    module: Any,
    asked: Mapping[str, Any],
    hidden: Tensor,
    *,
    layer_past: _StepAsCache,
    position_embeddings: tuple[Tensor, Tensor],
    **unused: Any,
) -> tuple[Tensor, None]:
    """The key and value heads stay as few as the checkpoint has."""
    from transformers.models.falcon import modeling_falcon

    kv, size = module.num_kv_heads, module.head_dim
    group = module.num_heads // kv
    fused = module.query_key_value(hidden).unflatten(2, (kv, group + 2, size))
    query, key, value = (x.flatten(2, 3).transpose(1, 2) for x in fused.split([group, 1, 1], 3))
    if "alibi_slopes" not in asked:
        rotate: Any = modeling_falcon.apply_rotary_pos_emb
        query, key = rotate(query, key, *position_embeddings)
    return module.dense(_attend(module, layer_past, asked, query, key, value)), None


def _adapt_bloom(module: Any, config: Any) -> None:
    if module.pretraining_tp > 1 and module.slow_but_exact:
        raise UnsupportedError("slow_but_exact with pretraining_tp > 1 is not honoured")
    asked = {"scaling": module.inv_norm_factor, "alibi_slopes": _slopes(module.num_heads)}
    module.forward = partial(_bloom, module, asked)


def _bloom(
    module: Any,
    asked: Mapping[str, Any],
    hidden: Tensor,
    residual: Tensor,
    *,
    layer_past: _StepAsCache,
    **unused: Any,
) -> tuple[Tensor, None]:
    qkv = module._reshape(module.query_key_value(hidden))
    return module.dense(_attend(module, layer_past, asked, *qkv)) + residual, None


def _adapt_mpt(module: Any, config: Any) -> None:
    slopes = _slopes(module.n_heads, odd_first=True)
    asked = {"scaling": module.softmax_scale, "alibi_slopes": slopes}
    module.forward = partial(_mpt, module, asked)


def _mpt(
    module: Any,
    asked: Mapping[str, Any],
    hidden: Tensor,
    *,
    past_key_values: _StepAsCache,
    **unused: Any,
) -> tuple[Tensor, None]:
    fused = module.Wqkv(hidden)
    if module.clip_qkv:
        fused = fused.clamp(-module.clip_qkv, module.clip_qkv)
    qkv = fused.unflatten(2, (3, module.n_heads, module.head_dim)).permute(2, 0, 3, 1, 4)
    return module.out_proj(_attend(module, past_key_values, asked, *qkv)), None


def _adapt_gptj(module: Any, config: Any) -> None:
    asked = {"scaling": 1 / float(module.scale_attn)}
    module._attn = partial(_gptj, module, asked)


def _gptj(
    module: Any,
    asked: Mapping[str, Any],
    query: Tensor,
    keys: _Keys,
    value: Tensor,
    *unused: Any,
) -> tuple[Tensor, None]:
    query, key = query.to(value.dtype), keys.key.to(value.dtype)
    out = keys.step.attend(module, query, key, value, asked)
    return out.transpose(1, 2), None


def _slopes(num_heads: int, *, odd_first: bool = False) -> tuple[float, ...]:
    """The slopes of ALiBi (Press et al., 2022): a geometric sequence that ends at 2^-8.

    For a number of heads that is no power of two, the heads beyond the power below take every
    other slope of twice that power; MPT orders the slopes of the power above, odd ones first.
    """
    below = 2 ** (num_heads.bit_length() - 1)

    def sequence(count: int) -> list[float]:
        return [2.0 ** (-8.0 * i / count) for i in range(1, count + 1)]

    if below == num_heads:
        return tuple(sequence(num_heads))
    finer = sequence(2 * below)
    if odd_first:
        return tuple([*finer[1::2], *finer[::2]][:num_heads])
    return (*sequence(below), *finer[::2][: num_heads - below])


_ADAPTERS: dict[str, Callable[[Any, Any], None]] = {
    "BloomAttention": _adapt_bloom,
    "CodeGenAttention": _adapt_gptj,
    "FalconAttention": _adapt_falcon,
    "GPTJAttention": _adapt_gptj,
    "MptAttention": _adapt_mpt,
}
"""By the name of the library's class, so that none is imported without need."""
