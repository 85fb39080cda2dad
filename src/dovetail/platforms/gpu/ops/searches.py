# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"
"""The bound of rows whose list was not enough, by passes over all their tokens.

``narrow`` is a pass that several programs share: each adds the number and mass of its tokens above
every pivot to what the others found, and the next launch divides the range by their sums. Its
pivots lie evenly in the logit, and as many passes as are launched leave a few tokens of most rows.
``search`` makes what passes are still needed, and all of them where a top_k is too large for a
list: one program then goes through its row alone.
"""

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.platforms.gpu.ops.ranks import (
    divide,
    last_kept,
    least_rank,
    lowest_rank,
    rank_beyond,
    share_up_to,
    survey,
    value_of,
)
from dovetail.platforms.gpu.ops.stages import BOUND, MANY

__all__ = ["narrow", "search"]

_WEIGHTLESS = tl.constexpr(-38.0)
"""So far below the peak, over the temperature, no token has a weight: exp(-38) is below 2**-53."""
_FLOAT_MAX = tl.constexpr(3.4e38)


@triton.jit
def _span(
    rounds,
    row,
    top_k,
    top_p_ptr,
    masses_ptr,
    numbers_ptr,
    pivots_ptr,
    found_numbers_ptr,
    found_masses_ptr,
    peak,
    heat,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOUND: tl.constexpr,
    PIVOTS: tl.constexpr,
):
    """The mass that top_p needs, and the range of its bound after some rounds.

    Rounds were left out where one token was left before them, and of rows that top_k cuts.
    """
    column = tl.arange(0, COLUMNS)
    at, real = row * CHUNKS + column, column < CHUNKS
    passing = tl.sum(tl.load(numbers_ptr + at, real, other=0), axis=0)
    mass = tl.sum(tl.load(masses_ptr + at, real, other=0), axis=0)
    need = share_up_to(tl.load(top_p_ptr + row), mass)
    low = least_rank(tl.maximum(peak + _WEIGHTLESS * heat, -_FLOAT_MAX), ID_BITS, SHIFT)
    high = rank_beyond(peak, ID_BITS, SHIFT)
    number, beyond = passing, passing * 0
    for earlier in range(0, tl.where(top_k < passing, 0, rounds)):
        if (high - low > 1) & (number - beyond > 1):
            found = row * FOUND + earlier * PIVOTS + tl.arange(0, PIVOTS)
            numbers, masses = tl.load(found_numbers_ptr + found), tl.load(found_masses_ptr + found)
            low, high, number, mass, beyond = divide(
                tl.load(pivots_ptr + found), numbers, masses, masses >= need,
                low, high, number, mass, beyond,
            )  # fmt: skip
    return need, low, high, number, mass, beyond, passing


@triton.jit(do_not_specialize=["round"])
def narrow(
    x_ptr,
    temperature_ptr,
    floor_ptr,
    top_k_ptr,
    top_p_ptr,
    peak_ptr,
    stage_ptr,
    masses_ptr,
    numbers_ptr,
    pivots_ptr,
    found_numbers_ptr,
    found_masses_ptr,
    row_step,
    round,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOUND: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    """One round of looking for the bound of top_p, on a part of a row."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(stage_ptr + row) == MANY:
        peak, heat = tl.load(peak_ptr + row), tl.load(temperature_ptr + row)
        top_k = tl.load(top_k_ptr + row).to(tl.int32)
        _need, low, high, number, _mass, beyond, passing = _span(
            round, row, top_k, top_p_ptr, masses_ptr, numbers_ptr, pivots_ptr, found_numbers_ptr,
            found_masses_ptr, peak, heat, ID_BITS, SHIFT, CHUNKS, COLUMNS, FOUND, PIVOTS,
        )  # fmt: skip
        if (top_k >= passing) & (high - low > 1) & (number - beyond > 1):
            pivots = _pivots(low, high, ID_BITS, SHIFT, PIVOTS)
            first = part * PART
            numbers, masses = survey(
                pivots, first, tl.minimum(first + PART, VOCAB), x_ptr + row * row_step, masses_ptr,
                peak, heat, tl.load(floor_ptr + row), low,
                ID_BITS, SHIFT, UNITS, False, False, PIVOTS, TILE,
            )  # fmt: skip
            found = row * FOUND + round * PIVOTS + tl.arange(0, PIVOTS)
            tl.store(pivots_ptr + found, pivots)
            tl.atomic_add(found_numbers_ptr + found, numbers, sem="relaxed")
            tl.atomic_add(found_masses_ptr + found, masses, sem="relaxed")


@triton.jit
def _pivots(low, high, ID_BITS: tl.constexpr, SHIFT: tl.constexpr, PIVOTS: tl.constexpr):
    """Evenly in the logit; within one logit, evenly among the ids."""
    place = 1 + 2 * tl.arange(0, PIVOTS)
    least, most = value_of(low, ID_BITS, SHIFT), value_of(high, ID_BITS, SHIFT)
    values = least + (most - least) * (place.to(tl.float32) / (2 * PIVOTS))
    even = low + (high - low) * place // (2 * PIVOTS)
    return tl.where(high - low > (1 << ID_BITS), least_rank(values, ID_BITS, SHIFT), even)


@triton.jit(do_not_specialize=["rounds"])
def search(
    x_ptr,
    temperature_ptr,
    floor_ptr,
    top_k_ptr,
    top_p_ptr,
    peak_ptr,
    bound_ptr,
    stage_ptr,
    masses_ptr,
    numbers_ptr,
    pivots_ptr,
    found_numbers_ptr,
    found_masses_ptr,
    row_step,
    rounds,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    FOUND: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The bound of a row, from what all rounds have left of the range."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(stage_ptr + row) == MANY:
        x_ptr += row * row_step
        peak, heat = tl.load(peak_ptr + row), tl.load(temperature_ptr + row)
        floor, top_k = tl.load(floor_ptr + row), tl.load(top_k_ptr + row).to(tl.int32)
        need, low, high, number, mass, beyond, passing = _span(
            rounds, row, top_k, top_p_ptr, masses_ptr, numbers_ptr, pivots_ptr, found_numbers_ptr,
            found_masses_ptr, peak, heat, ID_BITS, SHIFT, CHUNKS, COLUMNS, FOUND, PIVOTS,
        )  # fmt: skip
        if top_k < passing:
            low, number, mass = last_kept(
                tl.maximum(top_k, 1), lowest_rank(ID_BITS, SHIFT), high, passing, mass, beyond,
                VOCAB, x_ptr, masses_ptr, peak, heat, floor, low,
                ID_BITS, SHIFT, UNITS, False, False, True, PIVOTS, TILE,
            )  # fmt: skip
            need = share_up_to(tl.load(top_p_ptr + row), mass)
        bound, number, mass = last_kept(
            need, low, high, number, mass, beyond,
            VOCAB, x_ptr, masses_ptr, peak, heat, floor, low,
            ID_BITS, SHIFT, UNITS, False, False, False, PIVOTS, TILE,
        )  # fmt: skip
        tl.store(bound_ptr + row, bound)
        tl.store(stage_ptr + row, tl.full([], BOUND, tl.int32))
