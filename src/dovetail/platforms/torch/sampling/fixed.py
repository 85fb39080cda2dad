"""A token for every row by operations whose shapes depend on the number of rows and tokens only.

Nothing is looked at on the host and every row goes the same way, whatever it asks for: steps that
are recorded once and replayed choose like this. The tokens are those of ``choice.choose``. Where a
row may have top_k, top_p or min_p, the whole vocabulary is searched for every row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from dovetail.platforms.torch.sampling.choice import GREEDY_BELOW
from dovetail.platforms.torch.sampling.order import greedy
from dovetail.platforms.torch.sampling.restriction import by_search
from dovetail.platforms.torch.sampling.rows import Rows
from dovetail.platforms.torch.sampling.weights import Controls, draw_from_all

__all__ = ["ChooseFixed", "choose_fixed"]


class ChooseFixed(Protocol):
    """Tokens of G rows, with shapes that the rows do not change."""

    def __call__(
        self, logits_GV: Tensor, controls: Controls | None, *, restricts: bool = True
    ) -> tuple[Tensor, Tensor]:
        """The likeliest token where the temperature is below 1e-5, else a draw.

        Args:
            logits_GV: Not changed.
            controls: Of the G rows. None: every row is greedy.
            restricts: False: no row that draws has top_k, top_p or min_p.

        Returns:
            Tokens (G,) int64, 0 where not finite; and (G,) bool: False where a row's logits hold
            NaN or +inf, or are all -inf.
        """


def choose_fixed(
    logits_GV: Tensor, controls: Controls | None, *, restricts: bool = True
) -> tuple[Tensor, Tensor]:
    """A ``ChooseFixed`` for logits of any float dtype, on a device that has float64."""
    likeliest, peak = greedy(logits_GV)
    finite = torch.isfinite(peak)
    if controls is None:
        return torch.where(finite, likeliest, 0), finite
    rows = Rows(logits_GV)
    cold = controls.temperature < GREEDY_BELOW
    warm = replace(controls, temperature=torch.where(cold, 1.0, controls.temperature))
    boundary = by_search(rows, peak[:, None], warm, counts=True) if restricts else None
    drawn = draw_from_all(rows, peak[:, None], warm, boundary)
    tokens = torch.where(cold[:, 0], likeliest, drawn)
    return torch.where(finite, tokens, 0), finite
