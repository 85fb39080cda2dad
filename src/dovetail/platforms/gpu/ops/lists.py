# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"
"""Drawing from a list of a row's likeliest tokens, in whatever order it has them."""

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.platforms.gpu.ops.ranks import (
    last_kept,
    rank_beyond,
    share_above,
    share_up_to,
    survey,
)
from dovetail.platforms.gpu.ops.stages import DONE, FEW, MANY

__all__ = ["last_listed", "settle"]


@triton.jit
def last_listed(
    need,
    low,
    high,
    number,
    mass,
    count,
    ranks_ptr,
    weights_ptr,
    bound,
    ID_BITS: tl.constexpr,
    BY_ID: tl.constexpr,
    BY_NUMBER: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """``last_kept`` of a list, none of which reaches ``high``."""
    return last_kept(
        need, low, high, number, mass, number * 0,
        count, ranks_ptr, weights_ptr, 0.0, 1.0, 0.0, bound,
        ID_BITS, 0, 1.0, True, BY_ID, BY_NUMBER, PIVOTS, TILE,
    )  # fmt: skip


@triton.jit
def settle(
    top_k_ptr,
    top_p_ptr,
    uniform_ptr,
    tokens_ptr,
    peak_ptr,
    bound_ptr,
    stage_ptr,
    masses_ptr,
    numbers_ptr,
    listed_ptr,
    ranks_ptr,
    weights_ptr,
    found_numbers_ptr,
    found_masses_ptr,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LIST: tl.constexpr,
    FOUND: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Draw each row whose list holds all that top_k and top_p keep; prepare a search of others."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(stage_ptr + row) == FEW:
        count = tl.load(listed_ptr + row)
        stage = tl.full([], MANY, tl.int32)
        column = tl.arange(0, COLUMNS)
        at, real = row * CHUNKS + column, column < CHUNKS
        passing = tl.sum(tl.load(numbers_ptr + at, real, other=0), axis=0)
        whole = tl.sum(tl.load(masses_ptr + at, real, other=0), axis=0)
        if count <= LIST:
            place, known = _from_list(
                ranks_ptr + row * LIST, weights_ptr + row * LIST, count, passing, whole,
                tl.load(top_k_ptr + row).to(tl.int32), tl.load(top_p_ptr + row),
                tl.load(uniform_ptr + row), tl.load(bound_ptr + row), tl.load(peak_ptr + row),
                VOCAB, ID_BITS, SHIFT, PIVOTS, TILE,
            )  # fmt: skip
            if known:
                tl.store(tokens_ptr + row, ((1 << ID_BITS) - 1) - place)
                stage = tl.full([], DONE, tl.int32)
        tl.store(stage_ptr + row, stage)
        found = row * FOUND + tl.arange(0, FOUND)
        tl.store(found_numbers_ptr + found, tl.zeros([FOUND], tl.int32))
        tl.store(found_masses_ptr + found, tl.zeros([FOUND], tl.int64))


@triton.jit
def _from_list(
    ranks_ptr,
    weights_ptr,
    count,
    passing,
    whole,
    top_k,
    top_p,
    uniform,
    bound,
    peak,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The drawn token, by its id counted down, and whether the list was enough to know it."""
    high = rank_beyond(peak, ID_BITS, SHIFT)
    _numbers, masses = survey(
        tl.full([PIVOTS], 0, tl.int64) + bound, 0, count, ranks_ptr, weights_ptr,
        0.0, 1.0, 0.0, bound, ID_BITS, 0, 1.0, True, False, PIVOTS, TILE,
    )  # fmt: skip
    mass = tl.max(masses, axis=0)
    number, place = count, bound
    complete = (top_k <= count) | (passing == count)
    if top_k < count:
        bound, number, mass = last_listed(
            tl.maximum(top_k, 1), bound, high, number, mass, count, ranks_ptr, weights_ptr, bound,
            ID_BITS, False, True, PIVOTS, TILE,
        )  # fmt: skip
    need = share_up_to(top_p, tl.where(complete, mass, whole))
    known = complete | ((top_k >= VOCAB) & (mass >= need))
    if known:
        bound, number, mass = last_listed(
            need, bound, high, number, mass, count, ranks_ptr, weights_ptr, bound,
            ID_BITS, False, False, PIVOTS, TILE,
        )  # fmt: skip
        place, _number, _mass = last_listed(
            share_above(uniform, mass), mass * 0, (mass * 0 + 1) << ID_BITS, number, mass,
            count, ranks_ptr, weights_ptr, bound, ID_BITS, True, False, PIVOTS, TILE,
        )  # fmt: skip
    return place, known
