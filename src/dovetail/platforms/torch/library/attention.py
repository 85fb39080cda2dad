"""Where the library's attention ends and ours begins.

The library's layers compute queries, keys and values, and call the attention function that is
registered under the name in the config. Ours is the same for every model and every step: what a
step needs comes to it with the arguments of the model's forward call, which the library hands down
from layer to layer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from dovetail.core.contracts.attention import AttentionBackend, AttentionSpec
from dovetail.core.errors import UnsupportedError

__all__ = ["BY_KEYWORD", "PagedStep", "Step", "Way", "paged_attention", "register"]

_NAME = "dovetail"
"""Our attention among the library's. No mask goes with it, so that the library builds none."""
_STEP = "dovetail_step"
"""The keyword argument that carries the step."""


class Step(Protocol):
    """One forward call, as the attention function sees it."""

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, asked: Mapping[str, Any]
    ) -> Tensor:
        """Attend in one layer.

        Args:
            layer: The library's module; its ``layer_idx`` is the layer's number.
            query: (1, H, T, E).
            key: (1, K, T, E), of this step's tokens only.
            value: As ``key``; its heads may be of another size.
            asked: What else the layer hands to its attention, by the library's names.

        Returns:
            (1, T, H, size of the values' heads)
        """
        ...


@dataclass(frozen=True, kw_only=True)
class Way:
    """How a step reaches the layers of a model."""

    attention: str
    """The attention implementation that the model's config names."""
    carry: Callable[[Step], dict[str, Any]]
    """The arguments of the model's forward call that hold the step."""


BY_KEYWORD = Way(attention=_NAME, carry=lambda step: {_STEP: step})
"""Through the keyword arguments that the library hands down to its attention functions."""


class PagedStep:
    """A step over the KV cache.

    Args:
        backend: Attends.
        plan: Its metadata for this step.
        caches: One per layer.
        specs: One per layer.
    """

    def __init__(
        self,
        backend: AttentionBackend,
        plan: object,
        caches: Sequence[Any],
        specs: Sequence[AttentionSpec],
    ) -> None:
        self.caches = list(caches)
        """One per layer, after the step."""
        self._backend = backend
        self._plan = plan
        self._specs = specs

    def attend(
        self, layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, asked: Mapping[str, Any]
    ) -> Tensor:
        """Write keys and values to the layer's cache, then attend. ``asked`` is in the spec."""
        number: Any = layer.layer_idx
        spec = self._specs[number]
        q_THE, k_TKE, v_TKE = (
            _widened(x[0].transpose(0, 1), spec.head_size) for x in (query, key, value)
        )
        out_THE, self.caches[number] = self._backend.attend(
            q_THE, k_TKE, v_TKE, self.caches[number], self._plan, spec
        )
        out: Tensor = out_THE[None, ..., : value.shape[-1]]
        return out


def _widened(x_THE: Tensor, size: int) -> Tensor:
    """Contiguous, with zeros at the end of each head where values are narrower than keys."""
    if x_THE.shape[-1] == size:
        return x_THE.contiguous()
    return functional.pad(x_THE, (0, size - x_THE.shape[-1]))


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    **asked: Any,
) -> tuple[Tensor, None]:
    """The library's attention function: (1, H, T, E) in, (1, T, H, E) and no weights out.

    Raises:
        UnsupportedError: The model did not hand the step down.
    """
    step: Step | None = asked.pop(_STEP, None)
    if step is None:
        raise UnsupportedError(
            f"{type(module).__name__} does not get the keyword arguments of the model's forward"
            " call"
        )
    return step.attend(module, query, key, value, {"attention_mask": attention_mask, **asked}), None


def register() -> None:
    """Enter our attention among the library's. May be called again."""
    AttentionInterface.register(_NAME, paged_attention)
