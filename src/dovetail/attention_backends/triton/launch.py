"""Launches of kernels: made as values, which can be run, or looked at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from dovetail.core.contracts.launches import launcher

__all__ = ["HOMES", "KERNELS", "Launch", "kernel_of", "run"]

KERNELS = "dovetail.attention_backends.triton.kernels"
HOMES: Mapping[str, str] = {
    "write": f"{KERNELS}.write",
    "prefill": f"{KERNELS}.prefill",
    "decode": f"{KERNELS}.decode",
    "reduce": f"{KERNELS}.decode",
}
"""The module of each kernel."""


@dataclass(frozen=True)
class Launch:
    """One kernel with all that it is given."""

    kernel: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    """Tensors, numbers, and None for an array that this variant does not read; in order."""
    options: Mapping[str, Any]
    """Constants, and ``num_warps`` and ``num_stages``."""


@cache
def kernel_of(name: str) -> Any:
    """The kernel, compiled or interpreted. Imports Triton when it is first asked for."""
    return getattr(import_module(HOMES[name]), name)


def run(launch: Launch) -> None:
    """Launch on the current stream."""
    launcher(kernel_of(launch.kernel), launch.grid)(*launch.arguments, **launch.options)
