# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"
"""Tokens as numbers: their place in the order of likelihood, and their weight.

The rank of a token is an int64 that is larger for what is likelier: the order of its logit above,
without the ``SHIFT`` bits that logits of 16 bits never have, and below it the token id, counted
down, in ``ID_BITS``. Ranks of a row are distinct, so a set of its likeliest tokens is said by one
bound. A weight is a whole number of units, as in ``platforms/torch/sampling/weights.py``; sums of
them are exact in int64 in any order, which needs no float64: GPUs made for desks have little of it.
Nor have others many conversions to int64, so the sums of whole rows (``masses_of``) take them late.

``last_kept`` finds the bound at which a count or a mass is reached: several pivots at once divide
what is left of the range, until one token is left in it.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = [
    "LOWEST",
    "divide",
    "key_of",
    "last_kept",
    "least_rank",
    "lowest_rank",
    "masses_of",
    "rank_beyond",
    "rank_of",
    "share_above",
    "share_up_to",
    "shares",
    "survey",
    "value_of",
    "weigh",
    "weight_of",
]

LOWEST = tl.constexpr(-(1 << 61))
"""Below every rank."""
_WHOLE = tl.constexpr(float(1 << 23))
"""From here on float32 holds whole numbers only."""
_FAR = tl.constexpr(-float(1 << 14))
"""So far below the peak, over the temperature, no token has a weight, nor does any min_p reach."""
TOGETHER = tl.constexpr(8)
"""Neighbours whose weights ``masses_of`` adds up in float32."""


@triton.jit
def key_of(x):
    """int32 with the order of float32 logits: both zeros are one, NaN is beyond infinity."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def rank_of(x, ids, ID_BITS: tl.constexpr, SHIFT: tl.constexpr):
    """int64 ranks of float32 logits."""
    return ((key_of(x) >> SHIFT).to(tl.int64) << ID_BITS) | ((1 << ID_BITS) - 1 - ids).to(tl.int64)


@triton.jit
def lowest_rank(ID_BITS: tl.constexpr, SHIFT: tl.constexpr):
    """Reached by every token."""
    return (tl.full([], -(1 << 31), tl.int64) >> SHIFT) << ID_BITS


@triton.jit
def least_rank(x, ID_BITS: tl.constexpr, SHIFT: tl.constexpr):
    """Reached by every token of this logit and by none of a lower one."""
    return (key_of(x) >> SHIFT).to(tl.int64) << ID_BITS


@triton.jit
def rank_beyond(x, ID_BITS: tl.constexpr, SHIFT: tl.constexpr):
    """Reached by no token of this logit or a lower one."""
    return ((key_of(x) >> SHIFT).to(tl.int64) + 1) << ID_BITS


@triton.jit
def value_of(rank, ID_BITS: tl.constexpr, SHIFT: tl.constexpr):
    """The float32 logit of a token of this rank."""
    key = (rank >> ID_BITS).to(tl.int32) << SHIFT
    bits = tl.where(key < 0, (key | ((1 << SHIFT) - 1)) ^ 0x7FFFFFFF, key)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def shares(x, peak, heat, UNITS: tl.constexpr):
    """Logits below the peak over the temperature, and their weights before these are made whole.

    The quotient is the nearest float32: a division of many by one number takes its reciprocal once,
    and what two corrections by fused multiply-adds leave is rounded right (Markstein, 1990).
    """
    below = tl.maximum(x - peak, heat * _FAR)
    inverse = tl.div_rn(1.0, heat)
    scaled = below * inverse
    scaled = tl.fma(tl.fma(-scaled, heat, below), inverse, scaled)
    scaled = tl.fma(tl.fma(-scaled, heat, below), inverse, scaled)
    return scaled, tl.exp(scaled) * UNITS


@triton.jit
def weight_of(share):
    """int64, of two that are as near the even one."""
    whole = tl.where(share < _WHOLE, (share + _WHOLE) - _WHOLE, share)
    return whole.to(tl.int64)


@triton.jit
def weigh(x, peak, heat, UNITS: tl.constexpr):
    """Logits below the peak over the temperature, and their weights, int64."""
    scaled, share = shares(x, peak, heat, UNITS)
    return scaled, weight_of(share)


@triton.jit
def masses_of(share, SIZE: tl.constexpr, CHUNKS: tl.constexpr, LOW_BITS: tl.constexpr):
    """int64 masses, (CHUNKS,), of as many chunks of SIZE shares together.

    With LOW_BITS a weight is a multiple of ``2**LOW_BITS`` and a smaller rest, both in float32,
    where neighbours are then added up without an error; without, the sums are those of int64.
    """
    groups: tl.constexpr = SIZE // TOGETHER
    if LOW_BITS > 0:
        coarse: tl.constexpr = 3.0 * (1 << (22 + LOW_BITS))
        fine: tl.constexpr = 3.0 * (1 << 22)
        high = (share + coarse) - coarse
        low = ((share - high) + fine) - fine
        high = tl.sum(tl.reshape(high, (groups, TOGETHER)), axis=1)
        low = tl.sum(tl.reshape(low, (groups, TOGETHER)), axis=1)
        mass = high.to(tl.int64) + low.to(tl.int64)
    else:
        mass = tl.sum(tl.reshape(weight_of(share), (groups, TOGETHER)), axis=1)
    return tl.sum(tl.reshape(mass, (CHUNKS, groups // CHUNKS)), axis=1)


@triton.jit
def share_up_to(fraction, total):
    """The least whole mass that reaches a float32 fraction of an int64 total; at least 1."""
    goal = fraction.to(tl.float64) * total.to(tl.float64)
    whole = goal.to(tl.int64)
    return tl.maximum(whole + (whole.to(tl.float64) < goal).to(tl.int64), 1)


@triton.jit
def share_above(fraction, total):
    """The least whole mass above a fraction, below 1, of the total; at most the total."""
    whole = (fraction.to(tl.float64) * total.to(tl.float64)).to(tl.int64)
    return tl.minimum(whole, total - 1) + 1


@triton.jit
def _tile(
    at,
    count,
    source_ptr,
    weights_ptr,
    peak,
    heat,
    floor,
    bound,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    LISTED: tl.constexpr,
    BY_ID: tl.constexpr,
):
    """Ranks and weights of the tokens at these places; ``LOWEST`` where there is none."""
    there = at < count
    if LISTED:
        rank = tl.load(source_ptr + at, there, other=LOWEST)
        weight = tl.load(weights_ptr + at, there, other=0)
    else:
        x = tl.load(source_ptr + at, there, other=float("-inf")).to(tl.float32)
        scaled, weight = weigh(x, peak, heat, UNITS)
        rank = tl.where(there & (scaled >= floor), rank_of(x, at, ID_BITS, SHIFT), LOWEST)
    if BY_ID:
        rank = tl.where(rank >= bound, rank & ((1 << ID_BITS) - 1), LOWEST)
    return rank, weight


@triton.jit
def survey(
    pivots,
    first,
    end,
    source_ptr,
    weights_ptr,
    peak,
    heat,
    floor,
    bound,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    LISTED: tl.constexpr,
    BY_ID: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Number and mass of the tokens whose rank reaches each of the pivots: int32 and int64 (P,).

    Tokens are those from ``first`` to before ``end`` of a list of ranks and weights (``LISTED``),
    or of a row of logits, where those count that pass the floor. ``BY_ID``: of the tokens that
    reach the bound, in order of id alone.
    """
    numbers = tl.zeros([PIVOTS, TILE], tl.int32)
    masses = tl.zeros([PIVOTS, TILE], tl.int64)
    for start in range(first, end, TILE):
        rank, weight = _tile(
            start + tl.arange(0, TILE), end, source_ptr, weights_ptr, peak, heat, floor, bound,
            ID_BITS, SHIFT, UNITS, LISTED, BY_ID,
        )  # fmt: skip
        reached = rank[None, :] >= pivots[:, None]
        numbers += reached.to(tl.int32)
        masses += tl.where(reached, weight[None, :], 0)
    return tl.sum(numbers, axis=1), tl.sum(masses, axis=1)


@triton.jit
def divide(pivots, numbers, masses, enough, low, high, number, mass, beyond):
    """What is left of a range once it is known which of the pivots (P,) enough tokens reach."""
    number = tl.minimum(number, tl.min(tl.where(enough, numbers, number), axis=0))
    mass = tl.minimum(mass, tl.min(tl.where(enough, masses, mass), axis=0))
    beyond = tl.maximum(beyond, tl.max(tl.where(enough, beyond, numbers), axis=0))
    highest = tl.maximum(low, tl.max(tl.where(enough, pivots, low), axis=0))
    lowest = tl.minimum(high, tl.min(tl.where(enough, high, pivots), axis=0))
    return highest, lowest, number, mass, beyond


@triton.jit
def last_kept(
    need,
    low,
    high,
    number,
    mass,
    beyond,
    count,
    source_ptr,
    weights_ptr,
    peak,
    heat,
    floor,
    bound,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    LISTED: tl.constexpr,
    BY_ID: tl.constexpr,
    BY_NUMBER: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The largest bound that enough tokens reach, and the number and mass of those.

    Args:
        need: The least mass, or with ``BY_NUMBER`` the least number.
        low: A bound that enough reach, with its ``number`` and ``mass``.
        high: A bound that not enough reach: at least ``beyond`` tokens do.

    The bound is that of a token only with ``BY_ID``; else any that the same tokens reach.
    """
    while (high - low > 1) & (BY_ID | (number - beyond > 1)):
        pivots = low + ((high - low) * (1 + 2 * tl.arange(0, PIVOTS)) // (2 * PIVOTS))
        numbers, masses = survey(
            pivots, 0, count, source_ptr, weights_ptr, peak, heat, floor, bound,
            ID_BITS, SHIFT, UNITS, LISTED, BY_ID, PIVOTS, TILE,
        )  # fmt: skip
        enough = numbers >= need if BY_NUMBER else masses >= need
        low, high, number, mass, beyond = divide(
            pivots, numbers, masses, enough, low, high, number, mass, beyond
        )
    return low, number, mass
