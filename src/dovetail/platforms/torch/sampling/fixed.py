"""A token for every row by operations whose shapes depend on the number of rows and tokens only.

Nothing is looked at on the host and every row goes the same way, whatever it asks for: steps that
are recorded once and replayed choose like this. The tokens are those of ``choice.choose``. It
costs a search of the whole vocabulary for each row, greedy rows among others included.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from dovetail.platforms.torch.sampling.choice import GREEDY_BELOW
from dovetail.platforms.torch.sampling.order import greedy
from dovetail.platforms.torch.sampling.restriction import by_search
from dovetail.platforms.torch.sampling.rows import Rows
from dovetail.platforms.torch.sampling.weights import Controls, draw_from_all

__all__ = ["ChooseFixed", "choose_fixed"]

ChooseFixed = Callable[[Tensor, Controls | None], tuple[Tensor, Tensor]]
"""From logits (G, V) and their controls to tokens and which are finite, (G,) each."""


def choose_fixed(logits_GV: Tensor, controls: Controls | None) -> tuple[Tensor, Tensor]:
    """Choose for G rows: the likeliest token where the temperature is below 1e-5, else a draw.

    Args:
        logits_GV: Any float dtype, on a device that has float64; not changed.
        controls: Of the G rows. None: every row is greedy.

    Returns:
        Tokens (G,) int64, 0 where not finite; and (G,) bool: False where a row's logits hold NaN or
        +inf, or are all -inf.
    """
    likeliest, peak = greedy(logits_GV)
    finite = torch.isfinite(peak)
    if controls is None:
        return torch.where(finite, likeliest, 0), finite
    rows = Rows(logits_GV)
    cold = controls.temperature < GREEDY_BELOW
    warm = replace(controls, temperature=torch.where(cold, 1.0, controls.temperature))
    boundary = by_search(rows, peak[:, None], warm, counts=True)
    drawn = draw_from_all(rows, peak[:, None], warm, boundary)
    tokens = torch.where(cold[:, 0], likeliest, drawn)
    return torch.where(finite, tokens, 0), finite
