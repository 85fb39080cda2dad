"""Where the library's attention ends and ours begins.

The library's layers compute queries, keys and values, and call the attention function that is
registered under the name in the config. Ours is the same for every model and every step: what a
step needs comes to it as a keyword argument of the model's forward call, which the library hands
down from layer to layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn
from transformers import AttentionInterface

from dovetail.core.contracts.attention import AttentionBackend, AttentionSpec
from dovetail.core.errors import UnsupportedError

__all__ = ["NAME", "STEP", "PagedStep", "Step", "paged_attention", "register"]

NAME = "dovetail"
"""Our attention among the library's. No mask goes with it, so that the library builds none."""
STEP = "dovetail_step"
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
            value: As ``key``.
            asked: What else the layer hands to its attention, by the library's names.

        Returns:
            (1, T, H, E)
        """
        ...


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
        q_THE, k_TKE, v_TKE = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
        out_THE, self.caches[number] = self._backend.attend(
            q_THE, k_TKE, v_TKE, self.caches[number], self._plan, self._specs[number]
        )
        out: Tensor = out_THE[None]
        return out


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
    step: Step | None = asked.pop(STEP, None)
    if step is None:
        raise UnsupportedError(
            f"{type(module).__name__} does not get the keyword arguments of the model's forward"
            " call"
        )
    return step.attend(module, query, key, value, {"attention_mask": attention_mask, **asked}), None


def register() -> None:
    """Enter our attention among the library's. May be called again."""
    AttentionInterface.register(NAME, paged_attention)
