"""The order of attention backends: data, in ``attention.toml``."""

from __future__ import annotations

import tomllib
from functools import cache
from importlib.resources import files

__all__ = ["Capability", "attention_order"]

Capability = tuple[int, int]
"""Compute capability of an NVIDIA GPU: major and minor."""


def attention_order(capability: Capability | None) -> tuple[str, ...]:
    """Names, preferred first.

    Args:
        capability: The GPU's; None: there is none.
    """
    orders = _orders()
    if capability is not None:
        major, minor = capability
        for name in (f"{major}.{minor}", f"{major}"):
            if name in orders:
                return tuple(orders[name])
    return tuple(orders["default"])


@cache
def _orders() -> dict[str, list[str]]:
    text = files("dovetail_cuda").joinpath("attention.toml").read_text("utf-8")
    orders: dict[str, list[str]] = tomllib.loads(text)["order"]
    return orders
