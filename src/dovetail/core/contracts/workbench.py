"""A platform taken apart: its ops, layers and attention, one by one, for the conformance kit."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from dovetail.core.contracts.ops import Op
from dovetail.core.types import Array

__all__ = ["Activity", "Workbench"]


class Workbench(Protocol):
    """The parts that a runner of the platform is made of, and the way from numpy to its arrays.

    Attention backends come from ``Platform.attention_backends``.
    """

    @property
    def ops(self) -> Any:
        """The op table as models get it, overrides included; its ``attention`` is not bound."""
        ...

    @property
    def overrides(self) -> Mapping[str, Op]:
        """The platform's own ops by name, with their tolerances."""
        ...

    def put(self, array: np.ndarray[Any, Any]) -> Array:
        """The array on the device, in the dtype that the numpy array has (ml_dtypes' included)."""
        ...

    def get(self, array: Array) -> np.ndarray[Any, Any]:
        """The array on the host, in its own dtype; waits for the device."""
        ...

    def bind_linear(self, weight: Array, bias: Array | None) -> Array:
        """What ``ops.linear`` takes for the weight (out, in) and bias (out,) of a layer."""
        ...

    def num_bytes(self, array: Array) -> int:
        """Bytes of device memory that an array holds, or that a KV cache holds in all its parts."""
        ...


@dataclass
class Activity:
    """What a device did while it was watched. Filled in as it goes."""

    to_device: int = 0
    """Copies of arrays from the host."""
    to_host: int = 0
    """Copies of arrays to the host."""
    shapes: set[Hashable] = field(default_factory=set)
    """Everything that a device with static shapes would have compiled: one member for each
    program, or for each op with the shapes and dtypes of its arrays."""
