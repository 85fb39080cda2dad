"""What is left of a row's tokens, said by its last one."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Boundary"]


@dataclass(frozen=True)
class Boundary:
    """The last token that is kept in each of n rows, in order of likelihood.

    The order is total: the larger logit first, and of equal logits the lower token id.
    """

    value: Tensor
    """(n, 1) float32: its logit."""
    id: Tensor
    """(n, 1) int64: its token id."""

    def keeps(self, x_NC: Tensor, ids: Tensor) -> Tensor:
        """(n, C) float32: 1 where the token is kept, else 0.

        Args:
            x_NC: float32 logits.
            ids: Their token ids, (n, C) or (C,).
        """
        above = torch.gt(x_NC, self.value, out=torch.empty_like(x_NC))
        level = torch.eq(x_NC, self.value, out=torch.empty_like(x_NC))
        return above.add_(level.mul_(ids <= self.id))

    def part(self, places: slice) -> Boundary:
        """Some of the rows."""
        return Boundary(self.value[places], self.id[places])
