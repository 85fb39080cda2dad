# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"
"""The kernels of ``choice``, in the order in which they run. Programs are numbered by row first."""

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.platforms.gpu.ops.ranks import (
    LOWEST,
    key_of,
    last_kept,
    rank_of,
    share_above,
    share_up_to,
    survey,
    value_of,
    weigh,
)

__all__ = ["draw", "peaks", "plan", "search", "settle", "sift"]

_DONE = tl.constexpr(0)
"""The row has its token."""
_FREE = tl.constexpr(1)
"""It is drawn from all that reach its bound; the mass of each chunk is known."""
_FEW = tl.constexpr(2)
"""Its likeliest tokens are listed."""
_MANY = tl.constexpr(3)
"""They were not enough to know its bound."""

_LEAST = tl.constexpr(-(1 << 31))
"""Below every key."""
_INFINITE = tl.constexpr(0x7F800000)
"""The key of infinity."""
_COLD = tl.constexpr(1e-5)
"""Temperatures below this are greedy."""


@triton.jit
def peaks(
    x_ptr,
    tops_ptr,
    row_step,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The highest rank in each block of a chunk of a row."""
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    blocks: tl.constexpr = CHUNK // BLOCK
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    x = tl.load(x_ptr + row * row_step + ids, ids < VOCAB, other=float("-inf")).to(tl.float32)
    rank = tl.where(ids < VOCAB, rank_of(x, ids, ID_BITS), LOWEST)
    tops = tl.max(tl.reshape(rank, (blocks, BLOCK)), axis=1)
    at = (row * CHUNKS + chunk) * blocks + tl.arange(0, blocks)
    tl.store(tops_ptr + at, tops)


@triton.jit
def plan(
    tops_ptr,
    temperature_ptr,
    top_k_ptr,
    top_p_ptr,
    tokens_ptr,
    finite_ptr,
    peak_ptr,
    bound_ptr,
    state_ptr,
    listed_ptr,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    TOPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    FEW: tl.constexpr,
    LIST: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """What each row needs. Greedy rows get their token, those that draw a bound for their list.

    A bound that n blocks reach is reached by n tokens at least, and seldom by many more.
    """
    row = tl.program_id(0).to(tl.int64)
    tops_ptr += row * TOPS
    best, worst = tl.full([], LOWEST, tl.int64), tl.full([], -LOWEST, tl.int64)
    for start in range(0, BLOCKS, TILE):
        at = start + tl.arange(0, TILE)
        best = tl.maximum(best, tl.max(tl.load(tops_ptr + at, at < BLOCKS, other=LOWEST), axis=0))
        worst = tl.minimum(
            worst, tl.min(tl.load(tops_ptr + at, at < BLOCKS, other=-LOWEST), axis=0)
        )
    key = (best >> ID_BITS).to(tl.int32)
    finite = (key >= -_INFINITE) & (key < _INFINITE)
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    restricted = (top_k < VOCAB) | (tl.load(top_p_ptr + row) < 1.0)
    warm = finite & (tl.load(temperature_ptr + row) >= _COLD)
    state = tl.where(warm, tl.where(restricted, _FEW, _FREE), _DONE)
    bound = tl.full([], _LEAST, tl.int64) << ID_BITS
    if VOCAB > LIST:  # noqa: SIM102, the one is known when this is compiled
        if state == _FEW:
            wanted = tl.minimum(tl.where(top_k < VOCAB, tl.maximum(top_k, 1), FEW), BLOCKS)
            bound, _number, _mass = last_kept(
                wanted, worst, best + 1, tl.full([], BLOCKS, tl.int32), best * 0,
                BLOCKS, tops_ptr, tops_ptr, 0.0, 1.0, 0.0, bound,
                ID_BITS, 1.0, True, False, True, PIVOTS, TILE,
            )  # fmt: skip
    token = ((1 << ID_BITS) - 1) - (best & ((1 << ID_BITS) - 1))
    tl.store(tokens_ptr + row, tl.where(finite, token, 0))
    tl.store(finite_ptr + row, finite)
    tl.store(peak_ptr + row, value_of(key))
    tl.store(bound_ptr + row, bound)
    tl.store(state_ptr + row, state)
    tl.store(listed_ptr + row, 0)


@triton.jit
def sift(
    x_ptr,
    temperature_ptr,
    floor_ptr,
    peak_ptr,
    bound_ptr,
    state_ptr,
    masses_ptr,
    numbers_ptr,
    listed_ptr,
    ranks_ptr,
    weights_ptr,
    row_step,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    LIST: tl.constexpr,
):
    """Number and mass of what passes min_p in a chunk of a row; what reaches the bound is listed.

    The order of a list depends on which chunk comes first, and nothing depends on that order.
    """
    row, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state = tl.load(state_ptr + row)
    if state != _DONE:
        ids = chunk * CHUNK + tl.arange(0, CHUNK)
        there = ids < VOCAB
        x = tl.load(x_ptr + row * row_step + ids, there, other=float("-inf")).to(tl.float32)
        peak, heat = tl.load(peak_ptr + row), tl.load(temperature_ptr + row)
        scaled, weight = weigh(x, peak, heat, UNITS)
        passes = there & (scaled >= tl.load(floor_ptr + row))
        mass = tl.sum(tl.where(passes, weight, 0), axis=0)
        tl.store(masses_ptr + row * CHUNKS + chunk, mass)
        if state == _FEW:
            tl.store(numbers_ptr + row * CHUNKS + chunk, tl.sum(passes.to(tl.int32), axis=0))
            rank = rank_of(x, ids, ID_BITS)
            listed = passes & (rank >= tl.load(bound_ptr + row))
            number = tl.sum(listed.to(tl.int32), axis=0)
            if number > 0:
                first = tl.atomic_add(listed_ptr + row, number, sem="relaxed")
                at = first + tl.cumsum(listed.to(tl.int32), axis=0) - 1
                fits = listed & (at < LIST)
                tl.store(ranks_ptr + row * LIST + at, rank, fits)
                tl.store(weights_ptr + row * LIST + at, weight, fits)


@triton.jit
def settle(
    top_k_ptr,
    top_p_ptr,
    uniform_ptr,
    tokens_ptr,
    peak_ptr,
    bound_ptr,
    state_ptr,
    masses_ptr,
    numbers_ptr,
    listed_ptr,
    ranks_ptr,
    weights_ptr,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LIST: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """Draw each row whose list holds all that top_k and top_p keep."""
    row = tl.program_id(0).to(tl.int64)
    state = tl.load(state_ptr + row)
    count = tl.load(listed_ptr + row)
    if state == _FEW:
        state = tl.full([], _MANY, tl.int32)
        if count <= LIST:
            column = tl.arange(0, COLUMNS)
            at, real = row * CHUNKS + column, column < CHUNKS
            passing = tl.sum(tl.load(numbers_ptr + at, real, other=0), axis=0)
            whole = tl.sum(tl.load(masses_ptr + at, real, other=0), axis=0)
            place, known = _from_list(
                ranks_ptr + row * LIST, weights_ptr + row * LIST, count, passing, whole,
                tl.load(top_k_ptr + row).to(tl.int32), tl.load(top_p_ptr + row),
                tl.load(uniform_ptr + row), tl.load(bound_ptr + row), tl.load(peak_ptr + row),
                VOCAB, ID_BITS, PIVOTS, TILE,
            )  # fmt: skip
            if known:
                tl.store(tokens_ptr + row, ((1 << ID_BITS) - 1) - place)
                state = tl.full([], _DONE, tl.int32)
        tl.store(state_ptr + row, state)


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
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The drawn token, by its id counted down, and whether the list was enough to know it."""
    high = (key_of(peak).to(tl.int64) + 1) << ID_BITS
    _numbers, masses = survey(
        tl.full([PIVOTS], 0, tl.int64) + bound, count, ranks_ptr, weights_ptr, 0.0, 1.0, 0.0, bound,
        ID_BITS, 1.0, True, False, PIVOTS, TILE,
    )  # fmt: skip
    mass = tl.max(masses, axis=0)
    number, place = count, bound
    complete = (top_k <= count) | (passing == count)
    if top_k < count:
        bound, number, mass = last_kept(
            tl.maximum(top_k, 1), bound, high, number, mass,
            count, ranks_ptr, weights_ptr, 0.0, 1.0, 0.0, bound,
            ID_BITS, 1.0, True, False, True, PIVOTS, TILE,
        )  # fmt: skip
    need = share_up_to(top_p, tl.where(complete, mass, whole))
    known = complete | ((top_k >= VOCAB) & (mass >= need))
    if known:
        bound, number, mass = last_kept(
            need, bound, high, number, mass,
            count, ranks_ptr, weights_ptr, 0.0, 1.0, 0.0, bound,
            ID_BITS, 1.0, True, False, False, PIVOTS, TILE,
        )  # fmt: skip
        place, _number, _mass = last_kept(
            share_above(uniform, mass), mass * 0, (mass * 0 + 1) << ID_BITS, number, mass,
            count, ranks_ptr, weights_ptr, 0.0, 1.0, 0.0, bound,
            ID_BITS, 1.0, True, True, False, PIVOTS, TILE,
        )  # fmt: skip
    return place, known


@triton.jit
def search(
    x_ptr,
    temperature_ptr,
    floor_ptr,
    top_k_ptr,
    top_p_ptr,
    peak_ptr,
    bound_ptr,
    state_ptr,
    masses_ptr,
    row_step,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The bound of each row whose list was not enough, by passes over the whole row."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state_ptr + row) == _MANY:
        x_ptr += row * row_step
        peak, heat = tl.load(peak_ptr + row), tl.load(temperature_ptr + row)
        floor, top_k = tl.load(floor_ptr + row), tl.load(top_k_ptr + row).to(tl.int32)
        bound = tl.full([], _LEAST, tl.int64) << ID_BITS
        high = (key_of(peak).to(tl.int64) + 1) << ID_BITS
        numbers, masses = survey(
            tl.full([PIVOTS], 0, tl.int64) + bound, VOCAB, x_ptr, masses_ptr, peak, heat, floor,
            bound, ID_BITS, UNITS, False, False, PIVOTS, TILE,
        )  # fmt: skip
        number, mass = tl.max(numbers, axis=0), tl.max(masses, axis=0)
        if top_k < number:
            bound, number, mass = last_kept(
                tl.maximum(top_k, 1), bound, high, number, mass,
                VOCAB, x_ptr, masses_ptr, peak, heat, floor, bound,
                ID_BITS, UNITS, False, False, True, PIVOTS, TILE,
            )  # fmt: skip
        bound, number, mass = last_kept(
            share_up_to(tl.load(top_p_ptr + row), mass), bound, high, number, mass,
            VOCAB, x_ptr, masses_ptr, peak, heat, floor, bound,
            ID_BITS, UNITS, False, False, False, PIVOTS, TILE,
        )  # fmt: skip
        for chunk in range(0, CHUNKS):
            weight = _kept(x_ptr, chunk, peak, heat, floor, bound, VOCAB, ID_BITS, UNITS, CHUNK)
            tl.store(masses_ptr + row * CHUNKS + chunk, tl.sum(weight, axis=0))
        tl.store(bound_ptr + row, bound)
        tl.store(state_ptr + row, tl.full([], _FREE, tl.int32))


@triton.jit
def _kept(
    x_ptr,
    chunk,
    peak,
    heat,
    floor,
    bound,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Weights of a chunk, 0 for tokens that do not pass the floor or reach the bound."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    there = ids < VOCAB
    x = tl.load(x_ptr + ids, there, other=float("-inf")).to(tl.float32)
    scaled, weight = weigh(x, peak, heat, UNITS)
    kept = there & (scaled >= floor) & (rank_of(x, ids, ID_BITS) >= bound)
    return tl.where(kept, weight, 0)


@triton.jit
def draw(
    x_ptr,
    temperature_ptr,
    floor_ptr,
    uniform_ptr,
    tokens_ptr,
    peak_ptr,
    bound_ptr,
    state_ptr,
    masses_ptr,
    row_step,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Draw each row that has no token yet: the chunk by the masses, then one of its tokens."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(state_ptr + row) == _FREE:
        column = tl.arange(0, COLUMNS)
        masses = tl.load(masses_ptr + row * CHUNKS + column, column < CHUNKS, other=0)
        need = share_above(tl.load(uniform_ptr + row), tl.sum(masses, axis=0))
        chunk = tl.sum((tl.cumsum(masses, axis=0) < need).to(tl.int32), axis=0)
        need -= tl.sum(tl.where(column < chunk, masses, 0), axis=0)
        weight = _kept(
            x_ptr + row * row_step, chunk, tl.load(peak_ptr + row), tl.load(temperature_ptr + row),
            tl.load(floor_ptr + row), tl.load(bound_ptr + row), VOCAB, ID_BITS, UNITS, CHUNK,
        )  # fmt: skip
        before = tl.sum((tl.cumsum(weight, axis=0) < need).to(tl.int32), axis=0)
        tl.store(tokens_ptr + row, (chunk * CHUNK + before).to(tl.int64))
