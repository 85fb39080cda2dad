"""Logits by the model's own code: its output layer, with the scaling or cap that comes with it."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

__all__ = ["make_head"]


class _Given(nn.Module):
    """Stands for the layers below the output layer: their output is the input.

    Args:
        output_class: What the real layers return.
    """

    def __init__(self, output_class: type[Any]) -> None:
        super().__init__()
        self._output_class = output_class

    def forward(self, *args: Any, inputs_embeds: Tensor, **kwargs: Any) -> Any:
        """The hidden states as they came."""
        return self._output_class(last_hidden_state=inputs_embeds)


def make_head(model: nn.Module, trunk: nn.Module, output_class: type[Any]) -> nn.Module:
    """The model with its layers taken out: hidden states in as ``inputs_embeds``, logits out.

    It shares every other module with ``model``, which stays as it is.

    Args:
        model: A causal language model of the library.
        trunk: The module in it that computes hidden states.
        output_class: The class of what ``trunk`` returns.
    """
    path = next(name for name, module in model.named_modules() if module is trunk)
    head = outer = _shallow(model)
    *parents, last = path.split(".")
    for name in parents:
        inner = _shallow(outer._modules[name])
        outer._modules[name] = inner
        outer = inner
    outer._modules[last] = _Given(output_class)
    return head


def _shallow(module: Any) -> nn.Module:
    """The same module with a list of children of its own."""
    twin: nn.Module = copy.copy(module)
    twin._modules = dict(module._modules)
    return twin
