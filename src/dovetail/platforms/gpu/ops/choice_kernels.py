# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"
"""The kernels of ``choice``, in the order in which they run. Programs are numbered by row first."""

from __future__ import annotations

import triton
import triton.language as tl

from dovetail.platforms.gpu.ops.lists import last_listed
from dovetail.platforms.gpu.ops.ranks import (
    LOWEST,
    key_of,
    lowest_rank,
    masses_of,
    rank_of,
    share_above,
    shares,
    value_of,
    weigh,
    weight_of,
)
from dovetail.platforms.gpu.ops.stages import BOUND, DONE, FEW, FREE
from dovetail.platforms.torch.sampling.choice import GREEDY_BELOW

__all__ = ["crown", "draw", "enlist", "measure", "peaks", "plan", "tally"]

_GREEDY_BELOW = tl.constexpr(GREEDY_BELOW)


@triton.jit
def peaks(
    x_ptr,
    tops_ptr,
    row_step,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    TOPS: tl.constexpr,
):
    """The highest rank in each block of SPAN chunks of a row.

    Within a block a token is known by few bits: with the key of a 16-bit logit they fit an int32.
    What lies behind the vocabulary counts as minus infinity and is not the highest of any block
    that begins within it.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size: tl.constexpr = CHUNK * SPAN
    ids = part * size + tl.arange(0, size)
    x = tl.load(x_ptr + row * row_step + ids, ids < VOCAB, other=float("-inf")).to(tl.float32)
    key = key_of(x) >> SHIFT
    if SHIFT < BLOCK_BITS:
        key = key.to(tl.int64)
    last: tl.constexpr = (1 << BLOCK_BITS) - 1
    blocks: tl.constexpr = size >> BLOCK_BITS
    place = (key << BLOCK_BITS) | (last - (ids & last))
    top = tl.max(tl.reshape(place, (blocks, last + 1)), axis=1)
    block = part * blocks + tl.arange(0, blocks)
    best = (block << BLOCK_BITS) + last - (top & last).to(tl.int32)
    rank = ((top >> BLOCK_BITS).to(tl.int64) << ID_BITS) | ((1 << ID_BITS) - 1 - best).to(tl.int64)
    tl.store(tops_ptr + row * TOPS + block, rank, block < TOPS)


@triton.jit
def _extremes(tops_ptr, BLOCKS: tl.constexpr, TILE: tl.constexpr):
    """The highest and the lowest of a row's tops."""
    best, worst = tl.full([], LOWEST, tl.int64), tl.full([], -LOWEST, tl.int64)
    for start in range(0, BLOCKS, TILE):
        at = start + tl.arange(0, TILE)
        real = at < BLOCKS
        best = tl.maximum(best, tl.max(tl.load(tops_ptr + at, real, other=LOWEST), axis=0))
        worst = tl.minimum(worst, tl.min(tl.load(tops_ptr + at, real, other=-LOWEST), axis=0))
    return best, worst


@triton.jit
def _token_of(rank, ID_BITS: tl.constexpr):
    return ((1 << ID_BITS) - 1) - (rank & ((1 << ID_BITS) - 1))


@triton.jit
def crown(
    tops_ptr,
    tokens_ptr,
    finite_ptr,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    TOPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The likeliest token of each row, where all rows are greedy."""
    row = tl.program_id(0).to(tl.int64)
    best, _worst = _extremes(tops_ptr + row * TOPS, BLOCKS, TILE)
    finite = tl.abs(value_of(best, ID_BITS, SHIFT)) < float("inf")
    tl.store(tokens_ptr + row, tl.where(finite, _token_of(best, ID_BITS), 0))
    tl.store(finite_ptr + row, finite)


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
    stage_ptr,
    listed_ptr,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    TOPS: tl.constexpr,
    BLOCKS: tl.constexpr,
    USUAL: tl.constexpr,
    LIST: tl.constexpr,
    PIVOTS: tl.constexpr,
    TILE: tl.constexpr,
):
    """What each row needs. Greedy rows get their token, those that draw a bound for their list.

    A bound that n blocks reach is reached by n tokens at least, and seldom by many more.
    """
    row = tl.program_id(0).to(tl.int64)
    tops_ptr += row * TOPS
    best, worst = _extremes(tops_ptr, BLOCKS, TILE)
    peak = value_of(best, ID_BITS, SHIFT)
    finite = tl.abs(peak) < float("inf")
    top_k = tl.load(top_k_ptr + row).to(tl.int32)
    restricted = (top_k < VOCAB) | (tl.load(top_p_ptr + row) < 1.0)
    warm = finite & (tl.load(temperature_ptr + row) >= _GREEDY_BELOW)
    stage = tl.where(warm, tl.where(restricted, FEW, FREE), DONE)
    bound = lowest_rank(ID_BITS, SHIFT)
    if VOCAB > LIST:  # noqa: SIM102, the one is known when this is compiled
        if stage == FEW:
            wanted = tl.minimum(tl.where(top_k < VOCAB, tl.maximum(top_k, 1), USUAL), BLOCKS)
            bound, _number, _mass = last_listed(
                wanted, worst, best + 1, tl.full([], BLOCKS, tl.int32), best * 0,
                BLOCKS, tops_ptr, tops_ptr, bound, ID_BITS, False, True, PIVOTS, TILE,
            )  # fmt: skip
    tl.store(tokens_ptr + row, tl.where(finite, _token_of(best, ID_BITS), 0))
    tl.store(finite_ptr + row, finite)
    tl.store(peak_ptr + row, peak)
    tl.store(bound_ptr + row, bound)
    tl.store(stage_ptr + row, stage)
    tl.store(listed_ptr + row, 0)


@triton.jit
def tally(
    x_ptr,
    temperature_ptr,
    floor_ptr,
    peak_ptr,
    stage_ptr,
    masses_ptr,
    numbers_ptr,
    row_step,
    VOCAB: tl.constexpr,
    UNITS: tl.constexpr,
    LOW_BITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    SPAN: tl.constexpr,
    RESTRICTS: tl.constexpr,
):
    """Mass of each of SPAN chunks of a row; where RESTRICTS, and number, of what passes min_p."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    size: tl.constexpr = CHUNK * SPAN
    ids = part * size + tl.arange(0, size)
    # All at once: a program that waits for one thing after the other is three times as long here.
    x = tl.load(x_ptr + row * row_step + ids, ids < VOCAB, other=float("-inf")).to(tl.float32)
    stage, floor = tl.load(stage_ptr + row), tl.load(floor_ptr + row)
    peak, heat = tl.load(peak_ptr + row), tl.load(temperature_ptr + row)
    if stage != DONE:
        scaled, share = shares(x, peak, heat, UNITS)
        chunk = part * SPAN + tl.arange(0, SPAN)
        if RESTRICTS:
            passes = (ids < VOCAB) & (scaled >= floor)
            share = tl.where(passes, share, 0.0)
            numbers = tl.sum(tl.reshape(passes.to(tl.int32), (SPAN, CHUNK)), axis=1)
            tl.store(numbers_ptr + row * CHUNKS + chunk, numbers, chunk < CHUNKS)
        masses = masses_of(share, size, SPAN, LOW_BITS)
        tl.store(masses_ptr + row * CHUNKS + chunk, masses, chunk < CHUNKS)


@triton.jit
def enlist(
    x_ptr,
    tops_ptr,
    temperature_ptr,
    floor_ptr,
    peak_ptr,
    bound_ptr,
    stage_ptr,
    listed_ptr,
    ranks_ptr,
    weights_ptr,
    row_step,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    BLOCK_BITS: tl.constexpr,
    BLOCKS: tl.constexpr,
    TOPS: tl.constexpr,
    LIST: tl.constexpr,
    SOME: tl.constexpr,
    FEW_BLOCKS: tl.constexpr,
):
    """List what passes min_p and reaches the bound in SOME blocks of a row, FEW_BLOCKS at a time.

    Blocks are looked into whose top reaches the bound. The order of a list depends on which program
    comes first, and nothing depends on that order.
    """
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    block = part * SOME + tl.arange(0, SOME)
    top = tl.load(tops_ptr + row * TOPS + block, block < BLOCKS, other=LOWEST)
    bound, floor = tl.load(bound_ptr + row), tl.load(floor_ptr + row)
    peak, heat = tl.load(peak_ptr + row), tl.load(temperature_ptr + row)
    if tl.load(stage_ptr + row) == FEW:
        reached = (top >= bound).to(tl.int32)
        number = tl.sum(reached, axis=0)
        place = tl.where(reached > 0, tl.cumsum(reached, axis=0) - 1, -1)
        for first in range(0, number, FEW_BLOCKS):
            turn = first + tl.arange(0, FEW_BLOCKS)
            mine = tl.where(place[None, :] == turn[:, None], block[None, :], 0)
            start = tl.sum(mine, axis=1) << BLOCK_BITS
            ids = start[:, None] + tl.arange(0, 1 << BLOCK_BITS)[None, :]
            there = (turn < number)[:, None] & (ids < VOCAB)
            x = tl.load(x_ptr + row * row_step + ids, there, other=float("-inf")).to(tl.float32)
            scaled, share = shares(x, peak, heat, UNITS)
            rank = rank_of(x, ids, ID_BITS, SHIFT)
            listed = there & (scaled >= floor) & (rank >= bound)
            many: tl.constexpr = FEW_BLOCKS << BLOCK_BITS
            flat = tl.reshape(listed.to(tl.int32), (many,))
            at = tl.atomic_add(listed_ptr + row, tl.sum(flat, axis=0), sem="relaxed")
            at = tl.reshape(at + tl.cumsum(flat, axis=0) - 1, (FEW_BLOCKS, 1 << BLOCK_BITS))
            fits = listed & (at < LIST)
            tl.store(ranks_ptr + row * LIST + at, rank, fits)
            tl.store(weights_ptr + row * LIST + at, weight_of(share), fits)


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
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Weights of a chunk, 0 for tokens that do not pass the floor or reach the bound."""
    ids = chunk * CHUNK + tl.arange(0, CHUNK)
    there = ids < VOCAB
    x = tl.load(x_ptr + ids, there, other=float("-inf")).to(tl.float32)
    scaled, weight = weigh(x, peak, heat, UNITS)
    kept = there & (scaled >= floor) & (rank_of(x, ids, ID_BITS, SHIFT) >= bound)
    return tl.where(kept, weight, 0)


@triton.jit
def measure(
    x_ptr,
    temperature_ptr,
    floor_ptr,
    peak_ptr,
    bound_ptr,
    stage_ptr,
    masses_ptr,
    row_step,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    PART: tl.constexpr,
):
    """The mass that is kept of each chunk in a part of a row, for rows that were searched."""
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if tl.load(stage_ptr + row) == BOUND:
        peak, heat = tl.load(peak_ptr + row), tl.load(temperature_ptr + row)
        floor, bound = tl.load(floor_ptr + row), tl.load(bound_ptr + row)
        first = part * (PART // CHUNK)
        for chunk in range(first, tl.minimum(first + PART // CHUNK, CHUNKS)):
            weight = _kept(
                x_ptr + row * row_step, chunk, peak, heat, floor, bound,
                VOCAB, ID_BITS, SHIFT, UNITS, CHUNK,
            )  # fmt: skip
            tl.store(masses_ptr + row * CHUNKS + chunk, tl.sum(weight, axis=0))


@triton.jit
def draw(
    x_ptr,
    temperature_ptr,
    floor_ptr,
    uniform_ptr,
    tokens_ptr,
    peak_ptr,
    bound_ptr,
    stage_ptr,
    masses_ptr,
    row_step,
    VOCAB: tl.constexpr,
    ID_BITS: tl.constexpr,
    SHIFT: tl.constexpr,
    UNITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Draw each row that has no token yet: the chunk by the masses, then one of its tokens."""
    row = tl.program_id(0).to(tl.int64)
    stage = tl.load(stage_ptr + row)
    if (stage == FREE) | (stage == BOUND):
        column = tl.arange(0, COLUMNS)
        masses = tl.load(masses_ptr + row * CHUNKS + column, column < CHUNKS, other=0)
        need = share_above(tl.load(uniform_ptr + row), tl.sum(masses, axis=0))
        chunk = tl.sum((tl.cumsum(masses, axis=0) < need).to(tl.int32), axis=0)
        need -= tl.sum(tl.where(column < chunk, masses, 0), axis=0)
        weight = _kept(
            x_ptr + row * row_step, chunk, tl.load(peak_ptr + row), tl.load(temperature_ptr + row),
            tl.load(floor_ptr + row), tl.load(bound_ptr + row), VOCAB, ID_BITS, SHIFT, UNITS, CHUNK,
        )  # fmt: skip
        before = tl.sum((tl.cumsum(weight, axis=0) < need).to(tl.int32), axis=0)
        tl.store(tokens_ptr + row, (chunk * CHUNK + before).to(tl.int64))
