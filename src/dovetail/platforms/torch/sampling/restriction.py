"""Which tokens min_p, top_k and top_p leave, in that order, each on what the one before left.

Each keeps the likeliest tokens and none below, so what is left is a beginning of the row's tokens
in order of likelihood (larger logit first, of equal logits the lower id), and its last token says
all. Ties at the boundary are therefore cut: exactly top_k tokens stay, and the smallest set whose
weight reaches top_p.

``by_sort`` is the definition. ``few`` looks at the likeliest tokens only and says for which rows
that was enough. ``by_search`` finds the boundary of any row with two histograms of 65536 bins (one
round of radix selection over weights each), without a sort and without asking the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dovetail.platforms.torch.sampling.boundary import Boundary
from dovetail.platforms.torch.sampling.order import likeliest, ordered, values_of
from dovetail.platforms.torch.sampling.rows import Rows
from dovetail.platforms.torch.sampling.weights import Controls, unit, weights

__all__ = ["Few", "by_search", "by_sort", "few"]


@dataclass(frozen=True)
class Few:
    """The K likeliest tokens of each of n rows, likeliest first."""

    values: Tensor
    """(n, K) float32 logits."""
    ids: Tensor
    """(n, K) int64"""
    weights: Tensor
    """(n, K) float64; 0 for those that are not kept."""
    num_kept: Tensor
    """(n, 1) int64"""
    covered: Tensor
    """(n,) bool: nothing beyond the K is kept. The other rows' figures mean nothing."""

    def boundary(self) -> Boundary:
        """Of the covered rows."""
        last = self.num_kept - 1
        return Boundary(self.values.gather(1, last), self.ids.gather(1, last))


def by_sort(x_NV: Tensor, controls: Controls) -> Boundary:
    """The definition, by a full sort of float32 logits."""
    values, ids = torch.sort(x_NV, dim=-1, descending=True, stable=True)
    w = weights(values, values[:, :1], controls.temperature, unit(x_NV.shape[1]))
    scaled = (values - values[:, :1]) / controls.temperature
    place = torch.arange(x_NV.shape[1], device=x_NV.device)
    w *= (scaled >= controls.floor) & (place < controls.top_k)
    sums = w.double().cumsum(-1)
    goal = controls.top_p * sums[:, -1:]
    last = (sums < goal).sum(-1, keepdim=True)
    return Boundary(values.gather(1, last), ids.gather(1, last))


def few(
    rows: Rows, maxima_NB: Tensor, peak_N1: Tensor, totals_N1: Tensor, controls: Controls, k: int
) -> Few:
    """The k likeliest tokens, and what is kept of them.

    Args:
        totals_N1: float64, the weight of all tokens that min_p and top_k leave; infinity where it
            is not known. Read only for rows of which min_p and top_k leave more than k.
    """
    values, ids = likeliest(rows, maxima_NB, k)
    k = values.shape[1]
    scaled = (values - peak_N1) / controls.temperature
    passes = scaled >= controls.floor
    inside = passes & (torch.arange(k, device=rows.device) < controls.top_k)
    w = scaled.exp_().mul_(unit(rows.vocab_size)).round_().double().mul_(inside)
    sums = w.cumsum(-1)
    complete = (controls.top_k <= k) | ~passes[:, -1:]
    if k == rows.vocab_size:
        complete = torch.ones_like(complete)
    goal = controls.top_p * torch.where(complete, sums[:, -1:], totals_N1)
    num_kept = (sums < goal).sum(-1, keepdim=True).add_(1).clamp_(max=k)
    return Few(
        values=values,
        ids=ids,
        weights=w.mul_(torch.arange(k, device=rows.device) < num_kept),
        num_kept=num_kept,
        covered=(complete | (sums[:, -1:] >= goal))[:, 0],
    )


def by_search(rows: Rows, peak_N1: Tensor, controls: Controls, *, counts: bool) -> Boundary:
    """The boundary of any row. ``counts``: some row's top_k is below the vocabulary size."""
    ids = torch.arange(rows.vocab_size, device=rows.device)
    units = unit(rows.vocab_size)
    found: list[Boundary] = []
    for part, x in rows.chunks():
        c = controls.take(part)
        scaled = (x - peak_N1[part]).div_(c.temperature)
        passes = torch.ge(scaled, c.floor, out=torch.empty_like(scaled))
        keys = ordered(x)
        if counts:
            held = torch.minimum(c.top_k, passes.sum(-1, keepdim=True))
            passes.mul_(_crossing(keys, passes, held.double()).keeps(x, ids))
        w = scaled.exp_().mul_(units).round_().mul_(passes)
        found.append(_crossing(keys, w, c.top_p * w.double().sum(-1, keepdim=True)))
    return Boundary(
        torch.cat([boundary.value for boundary in found]),
        torch.cat([boundary.id for boundary in found]),
    )


def _crossing(keys_NV: Tensor, mass_NV: Tensor, goal_N1: Tensor) -> Boundary:
    """The token at which the mass of the likeliest tokens reaches the goal (n, 1), float64.

    Tokens of equal key have equal mass, except that the higher ids of them may have none. Masses
    are whole numbers; the mass of all reaches the goal.
    """
    mass = mass_NV.double()
    high = (keys_NV >> 16).long() + (1 << 15)
    top, above = _bin(high, mass, goal_N1)
    low = (keys_NV & 0xFFFF).long()
    inner, inside = _bin(low, mass * (high == top), goal_N1 - above)
    above = above + inside
    key = (((top - (1 << 15)) << 16) | inner).int()
    level = keys_NV == key
    each = (mass * level).amax(-1, keepdim=True)
    place = _needed(goal_N1, above, each)
    last = (level.cumsum(-1, dtype=torch.int32) < place).sum(-1, keepdim=True)
    return Boundary(values_of(key), last.clamp_(max=keys_NV.shape[1] - 1))


def _bin(digits_NV: Tensor, mass_NV: Tensor, goal_N1: Tensor) -> tuple[Tensor, Tensor]:
    """The largest digit that, with those above, has the goal's mass; and the mass above it."""
    bins = torch.zeros(len(digits_NV), 1 << 16, dtype=torch.float64, device=digits_NV.device)
    bins.scatter_add_(1, digits_NV, mass_NV)
    falling = bins.flip(-1)
    sums = falling.cumsum(-1)
    place = (sums < goal_N1).sum(-1, keepdim=True).clamp_(max=(1 << 16) - 1)
    return (1 << 16) - 1 - place, sums.gather(1, place) - falling.gather(1, place)


def _needed(goal_N1: Tensor, above_N1: Tensor, each_N1: Tensor) -> Tensor:
    """The least whole r for which ``above + r * each >= goal``, exactly."""
    r = ((goal_N1 - above_N1) / each_N1).ceil_().clamp_(min=1)
    r = r - (above_N1 + (r - 1) * each_N1 >= goal_N1).double()
    r = r + (above_N1 + r * each_N1 < goal_N1).double()
    return r.clamp_(min=1)
