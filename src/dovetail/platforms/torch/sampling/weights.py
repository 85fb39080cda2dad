"""Exact weights, and drawing from them by inverting the cumulative distribution.

The weight of a token is ``exp((logit - peak) / temperature)``, rounded to a whole number of units
so small that the sum of all of a row's weights stays below 2**52. Float64 sums of such numbers are
exact, so they do not depend on the order of addition: the same token is drawn whatever the batch,
the row, the number of threads, and whether all tokens or only the likeliest are looked at.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import SamplingBatch
from dovetail.platforms.torch.sampling.boundary import Boundary
from dovetail.platforms.torch.sampling.rows import BLOCK, Rows, Which, on_device, per_block

__all__ = ["Controls", "draw_from_all", "draw_from_few", "total_weights", "unit", "weights"]


@dataclass(frozen=True, kw_only=True)
class Controls:
    """How each of n rows is drawn, on the device; every field is (n, 1)."""

    temperature: Tensor
    """float32, above 0."""
    floor: Tensor
    """float32: the logarithm of min_p."""
    top_k: Tensor
    """int64."""
    top_p: Tensor
    """float64."""
    uniform: Tensor
    """float64, in [0, 1)."""

    @classmethod
    def of(cls, batch: SamplingBatch, which: Which, device: torch.device) -> Controls:
        """The controls of rows ``which`` of the batch, in one copy to the device."""
        with np.errstate(divide="ignore"):
            floor = np.log(batch.min_p[which].astype(np.float64))
        table = np.stack(
            (
                batch.temperature[which],
                floor,
                batch.top_k[which],
                batch.top_p[which],
                batch.uniform[which],
            )
        )
        values = on_device(table.astype(np.float64), device)[:, :, None]
        return cls(
            temperature=values[0].float(),
            floor=values[1].float(),
            top_k=values[2].long(),
            top_p=values[3],
            uniform=values[4],
        )

    def take(self, index: Tensor | slice) -> Controls:
        """Some of the rows."""
        return Controls(**{f.name: getattr(self, f.name)[index] for f in fields(self)})


def unit(vocab_size: int) -> float:
    """Units in the weight of a row's likeliest token: a power of two."""
    return 2.0 ** (52 - vocab_size.bit_length())


def weights(x_NC: Tensor, peak_N1: Tensor, temperature_N1: Tensor, units: float) -> Tensor:
    """(n, C) float32 whole numbers: the weights of logits.

    Only operations whose result for an element does not depend on its place are used; torch's
    ``exp`` is one, its ``exp2`` is not.
    """
    return (x_NC - peak_N1).div_(temperature_N1).exp_().mul_(units).round_()


def total_weights(rows: Rows, peak_N1: Tensor, temperature_N1: Tensor) -> Tensor:
    """(n, 1) float64: the sum of the weights of the whole vocabulary."""
    units = unit(rows.vocab_size)
    totals = torch.empty(len(rows), 1, dtype=torch.float64, device=rows.device)
    for part, x in rows.chunks():
        w = weights(x, peak_N1[part], temperature_N1[part], units)
        torch.sum(w.double(), -1, keepdim=True, out=totals[part])
    return totals


def draw_from_few(ids_NK: Tensor, weights_NK: Tensor, uniform_N1: Tensor) -> Tensor:
    """(n,) ids drawn among K candidates, in order of id; float64 weights."""
    ids, order = ids_NK.sort(-1)
    sums = weights_NK.gather(1, order).cumsum(-1)
    return ids.gather(1, _first_beyond(sums, uniform_N1 * sums[:, -1:]))[:, 0]


def draw_from_all(
    rows: Rows, peak_N1: Tensor, controls: Controls, boundary: Boundary | None = None
) -> Tensor:
    """(n,) ids drawn from the whole vocabulary, or from what the boundary leaves."""
    units = unit(rows.vocab_size)
    every = torch.arange(rows.vocab_size, device=rows.device)
    parts = []
    for part, x in rows.chunks():
        w = weights(x, peak_N1[part], controls.temperature[part], units)
        if boundary is not None:
            w.mul_(boundary.part(part).keeps(x, every))
        parts.append(per_block(w.double(), BLOCK, torch.sum))
    sums = parts[0] if len(parts) == 1 else torch.cat(parts)
    ends = sums.cumsum(-1)
    target = controls.uniform * ends[:, -1:]
    block = _first_beyond(ends, target)
    target -= ends.gather(1, block) - sums.gather(1, block)
    ids = block * BLOCK + torch.arange(BLOCK, device=rows.device)
    inside = ids < rows.vocab_size
    ids.clamp_(max=rows.vocab_size - 1)
    x = rows.take(ids)
    w = weights(x, peak_N1, controls.temperature, units).mul_(inside)
    if boundary is not None:
        w.mul_(boundary.keeps(x, ids))
    return ids.gather(1, _first_beyond(w.double().cumsum(-1), target))[:, 0]


def _first_beyond(sums_NC: Tensor, target_N1: Tensor) -> Tensor:
    """(n, 1) the first column whose running sum exceeds the target.

    Targets are held below the last sum, so the column found has a weight above 0: the sums are
    whole numbers and grow there.
    """
    held = torch.minimum(target_N1, sums_NC[:, -1:] - 1)
    return (sums_NC <= held).sum(-1, keepdim=True).clamp_(max=sums_NC.shape[1] - 1)
