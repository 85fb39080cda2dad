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
from dovetail.core.types import FloatArray
from dovetail.platforms.torch.sampling.boundary import Boundary
from dovetail.platforms.torch.sampling.rows import BLOCK, Rows, Which, on_device, per_block

__all__ = ["Controls", "draw_from_all", "draw_from_few", "total_weights", "unit", "weights"]


@dataclass(frozen=True, kw_only=True)
class Controls:
    """How each of n rows is drawn, on the device; every field is (n, 1) float32.

    Products with weights are taken in float64, to which torch promotes them.
    """

    temperature: Tensor
    """Above 0, except for ``choose_fixed``, to which below 1e-5 means greedy."""
    floor: Tensor
    """The logarithm of min_p."""
    top_k: Tensor
    """A whole number; vocabularies have fewer than 2**24 tokens, so it is exact."""
    top_p: Tensor
    uniform: Tensor
    """In [0, 1)."""

    @classmethod
    def of(cls, batch: SamplingBatch, which: Which, device: torch.device) -> Controls:
        """The controls of rows ``which`` of the batch, in one copy to the device."""
        return cls.unpack(on_device(cls.pack(batch)[:, which], device))

    @staticmethod
    def pack(batch: SamplingBatch, num_rows: int | None = None) -> FloatArray:
        """(5, G) on the host: what ``unpack`` takes once it is on the device.

        Args:
            num_rows: G if it is more than the rows of the batch; those behind them are greedy.
        """
        given = len(batch.temperature)
        table = np.zeros((5, given if num_rows is None else num_rows), np.float32)
        with np.errstate(divide="ignore"):
            floor = np.log(batch.min_p.astype(np.float64))
        columns = (batch.temperature, floor, batch.top_k, batch.top_p, batch.uniform)
        for field, column in zip(table, columns, strict=True):
            field[:given] = column
        return table

    @classmethod
    def unpack(cls, table_5G: Tensor) -> Controls:
        """Views of a float32 table on the device, whose five rows are the fields in order."""
        return cls(**dict(zip((f.name for f in fields(cls)), table_5G[:, :, None], strict=True)))

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
