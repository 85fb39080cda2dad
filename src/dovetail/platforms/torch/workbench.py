"""A torch platform taken apart, for the conformance kit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.platforms.torch.dtypes import from_numpy, to_numpy
from dovetail.platforms.torch.loading import op_table
from dovetail.platforms.torch.platform import BoundLinear, TorchPlatform

__all__ = ["TorchWorkbench"]


class TorchWorkbench:
    """See ``core/contracts/workbench.py``."""

    def __init__(self, platform: TorchPlatform) -> None:
        table = op_table(platform)
        self.ops: Any = table.bind()
        self.overrides = table.overrides
        self._platform = platform

    def put(self, array: np.ndarray[Any, Any]) -> Tensor:
        """A tensor of its own memory."""
        return from_numpy(array).to(self._platform.device, copy=True)

    def get(self, array: Tensor) -> np.ndarray[Any, Any]:
        """Waits for the device."""
        return to_numpy(array)

    def bind_linear(self, weight: Tensor, bias: Tensor | None) -> BoundLinear:
        """As the platform binds the layers of models."""
        return self._platform.bind_linear(weight, bias)

    def num_bytes(self, array: Any) -> int:
        """Of a tensor, or of all tensors that an object or a collection holds, each once."""
        storages = {t.untyped_storage().data_ptr(): t for t in _tensors(array)}
        return sum(tensor.untyped_storage().nbytes() for tensor in storages.values())


def _tensors(held: Any) -> Iterator[Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, dict):
        for value in held.values():
            yield from _tensors(value)
    elif isinstance(held, list | tuple):
        for value in held:
            yield from _tensors(value)
    elif hasattr(held, "__dict__"):
        yield from _tensors(vars(held))
