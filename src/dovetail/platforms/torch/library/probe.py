"""What a loaded model asks of its attention, found by running it on two or three tokens.

The layers' calls say more than the config: their heads, scale, window and soft cap, and whatever
our attention cannot honour. The masks that the library would build are asked as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.errors import UnsupportedError
from dovetail.platforms.torch.library.attention import Step, paged_attention

__all__ = [
    "PROBE_NAME",
    "Recorder",
    "check_independence",
    "check_windows",
    "find_specs",
    "register_probe",
]

PROBE_NAME = "dovetail_probe"
"""Our attention with masks, which the recorder reads."""
Call = Callable[[Tensor, Tensor, Step], Any]
"""Token ids (T,), their positions (T,) and a step in; out comes the library's output, whose first
entry is the hidden states, (1, T, D)."""

_FULL_LENGTH = 64
"""Keys at which a mask without a window is looked at."""
_POSITIONAL = frozenset({"attention_mask", "position_ids", "cache_position"})
"""Tensors that the spec or the step stand for."""
_TOLERANCE = 0.02
"""Of the norm of a hidden state. Rounding stays far below it, a neighbour's influence far above."""


class Recorder:
    """A step that notes what each layer asks, and lets each token attend to itself only."""

    def __init__(self) -> None:
        self._specs: dict[int, AttentionSpec] = {}

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, asked: Mapping[str, Any]
    ) -> Tensor:
        """Note the spec. Raises UnsupportedError if it does not say all that is asked."""
        reason = _refuses(layer, query, key, value, asked)
        if reason is not None:
            raise UnsupportedError(reason)
        spec = _spec(layer, query, value, asked)
        if spec.layer in self._specs:
            raise UnsupportedError(f"layer {spec.layer} attends twice in one step")
        self._specs[spec.layer] = spec
        group = spec.num_heads // spec.num_kv_heads
        return value.transpose(1, 2).repeat_interleave(group, dim=2)

    def specs(self, num_layers: int) -> tuple[AttentionSpec, ...]:
        """One per layer, in order.

        Raises:
            UnsupportedError: Not every layer attends.
        """
        if not self._specs:
            raise UnsupportedError("its layers do not call the library's attention interface")
        absent = [str(i) for i in range(num_layers) if i not in self._specs]
        if absent:
            raise UnsupportedError(
                f"{len(absent)} of its {num_layers} layers do not attend (layer {absent[0]} is the"
                " first); what they keep in place of keys and values is not known here"
            )
        if len(self._specs) > num_layers:
            raise UnsupportedError(
                f"{len(self._specs)} layers attend, and its config.json has {num_layers}"
            )
        return tuple(self._specs[i] for i in range(num_layers))


def find_specs(
    call: Call, num_layers: int, device: torch.device
) -> tuple[tuple[AttentionSpec, ...], Any]:
    """Run two tokens: what the layers ask, and the output.

    Raises:
        UnsupportedError: Something that our attention cannot honour.
    """
    recorder = Recorder()
    pair = torch.arange(2, device=device)
    output = call(pair, pair, recorder)
    return recorder.specs(num_layers), output


def check_independence(call: Call, device: torch.device) -> None:
    """Find out whether tokens influence each other beside the attention, as convolutions would.

    A step holds the tokens of many requests, so they must not: the same token at the same position
    has to come out the same, whatever stands before and behind it.

    Raises:
        UnsupportedError: They do.
    """
    there_and_back = torch.tensor([0, 1, 0], device=device)
    first, _, last = call(there_and_back, there_and_back, Recorder())[0][0].float()
    if not (first - last).norm() <= _TOLERANCE * first.norm():
        raise UnsupportedError(
            "its tokens influence each other beside the attention, or it does not count their"
            " positions as it is told"
        )


def check_windows(config: Any, specs: Sequence[AttentionSpec], max_model_len: int) -> None:
    """Find out whether the library's own KV cache would forget what its masks let tokens see.

    Args:
        config: The library's.
        specs: What the layers and their masks ask.
        max_model_len: The longest sequence.

    Raises:
        UnsupportedError: It would, so that a token's answer depends on the steps before it.
    """
    for spec, kept in zip(specs, DynamicCache(config=config).layers, strict=False):
        limit = getattr(kept, "sliding_window", None)
        if limit is not None and limit < max_model_len and limit != spec.window:
            raise UnsupportedError(
                f"layer {spec.layer} sees {spec.window or 'all'} positions by its mask, but {limit}"
                f" by the library's KV cache; --max-model-len {limit} or less makes them agree"
            )


def register_probe() -> None:
    """Enter the attention and its masks among the library's. May be called again."""
    AttentionInterface.register(PROBE_NAME, paged_attention)
    AttentionMaskInterface.register(PROBE_NAME, _mask_rows)


def _mask_rows(
    *, mask_function: Callable[..., Any], local_size: int | None = None, **unused: Any
) -> Tensor:
    """Three rows of a mask long enough to see beyond its window: (1, 1, 3, L), True where visible.

    Empty if the mask is a function of more than the two positions.
    """
    length = 2 * (local_size or _FULL_LENGTH) + 2
    try:
        rows = mask_function(0, 0, _looking(length)[:, None], torch.arange(length)[None])
        return torch.as_tensor(rows, device="cpu").expand(1, 1, 3, length)
    except (TypeError, IndexError, RuntimeError):
        return torch.zeros(1, 1, 3, 0, dtype=torch.bool)


def _looking(length: int) -> Tensor:
    """The query positions of the rows: the first, the middle and the last."""
    return torch.tensor([0, length // 2, length - 1])


def _refuses(
    layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, asked: Mapping[str, Any]
) -> str | None:
    """Why our attention cannot serve a call; None if it can."""
    foreign = [k for k, v in asked.items() if isinstance(v, Tensor) and k not in _POSITIONAL]
    if foreign:
        return f"its attention takes {', '.join(foreign)}, which paged attention does not know"
    if getattr(layer, "layer_idx", None) is None:
        return f"its {type(layer).__name__} modules do not know their layer's number"
    if not (asked.get("is_causal") is not False and getattr(layer, "is_causal", True)):
        return "its attention is not causal"
    if key.shape[:3] != value.shape[:3] or key.shape[2:] != query.shape[2:]:
        return (
            f"its queries, keys and values are not of the same tokens: {tuple(query.shape)},"
            f" {tuple(key.shape)} and {tuple(value.shape)} (1, heads, tokens, size)"
        )
    mask = asked.get("attention_mask")
    if mask is not None and not _is_causal(mask, _window(mask)):
        return "its attention mask is more than causal or a sliding window"
    return None


def _spec(
    layer: nn.Module, query: Tensor, value: Tensor, asked: Mapping[str, Any]
) -> AttentionSpec:
    mask = asked.get("attention_mask")
    scale, cap = asked.get("scaling"), asked.get("softcap")
    number: Any = layer.layer_idx
    return AttentionSpec(
        layer=number,
        num_heads=query.shape[1],
        num_kv_heads=value.shape[1],
        head_size=max(query.shape[3], value.shape[3]),
        scale=float(query.shape[3] ** -0.5 if scale is None else scale),
        window=asked.get("sliding_window") if mask is None else _window(mask),
        soft_cap=None if cap is None else float(cap),
        alibi_slopes=asked.get("alibi_slopes"),
    )


def _window(mask: Tensor) -> int | None:
    """The positions that the last row sees, if it does not see all."""
    seen, length = int(mask[0, 0, -1].sum()), mask.shape[-1]
    return seen if seen < length else None


def _is_causal(mask: Tensor, window: int | None) -> bool:
    """Whether the rows see what precedes them, within the window, and nothing else."""
    length = mask.shape[-1]
    if mask.dtype != torch.bool or mask.shape[-2] != 3 or not length:
        return False
    distance = _looking(length)[:, None] - torch.arange(length)
    visible = (distance >= 0) & (distance < (window or length))
    return bool(torch.equal(mask[0, 0].cpu(), visible))
