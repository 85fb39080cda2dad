"""A runner that can be looked into: the ops that its model calls, one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

__all__ = ["SAMPLING", "ObservableRunner", "OpsView", "Wrap"]

Wrap: TypeAlias = Callable[[str, Callable[..., Any]], Callable[..., Any]]
"""From an op's name and what computes it to what is called in its place."""

SAMPLING = "sampling"
"""The name under which the choice of tokens from logits is wrapped; it is no op of models."""


@dataclass(frozen=True, kw_only=True)
class OpsView:
    """What is needed to understand the arguments of wrapped ops."""

    parameters: Mapping[int, str]
    """The ``id`` of what ops are given for a parameter, and its path in the model's tree of
    weights: ``layers.0.mlp.down``."""
    num_bytes: Callable[[object], int]
    """Of the numbers in an array, or in all arrays of a tuple or list; 0 for anything else."""


@runtime_checkable
class ObservableRunner(Protocol):
    """What a runner may have besides, whose ops are called one by one from Python.

    A runner that gives its device whole programs has no such method.
    """

    def wrap_ops(self, wrap: Wrap) -> AbstractContextManager[OpsView]:
        """Have all ops of the served model, and ``SAMPLING``, go through ``wrap`` for a while.

        Called after ``warm_up``, between steps. Until the context ends, steps run op by op, even
        those that were recorded: they are slower, and give the same tokens. An op that is made of
        others is wrapped as they are, and calls them inside its own call.

        Raises:
            UnsupportedError: The served model does not call ops.
        """
        ...
