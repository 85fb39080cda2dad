# mypy: disable-error-code="import-untyped"
"""Choosing a token for every row in 15 launches, whatever the rows ask for.

What is launched depends on the number of rows and tokens only and nothing is looked at on the host,
so that it can stand at the end of a recorded step. Rows that need no more of a launch leave it at
once. Where it is known that every row is greedy two launches are enough, and four where no row has
top_k, top_p or min_p. The tokens are those of ``platforms/torch/sampling``, by the same whole
weights and the same order. Only ``exp`` is the device's own, so a token can differ from torch's
where the noise or top_p falls within some 2**-20 of the border between two. A row's token does not
depend on other rows.

=======  ========  ====================================  =======================================
launch   programs  reads                                 finds
=======  ========  ====================================  =======================================
peaks    G x C/4   the logits                            the likeliest token of each block of 64
plan     G         the blocks                            greedy tokens; a bound that enough
                                                         blocks reach, where there is top_k or
                                                         top_p
tally    G x C/4   the logits of rows that draw          number and mass of what passes min_p
                                                         in each chunk of 2048
enlist   G x B/128 the logits of blocks that reach the   a list of what reaches the bound
                   bound
settle   G         the lists                             tokens of rows whose list is enough
narrow   G x V/8K  the logits of the other rows          a range for the bound of top_p, each
(7 times)                                                time an eighth of the one before
search   G         the ranges                            the bound itself
measure  G x V/8K  the logits of the same rows           the mass of what each chunk keeps
draw     G         the chunks; the logits of one         the tokens that are still missing
=======  ========  ====================================  =======================================

The floor is the time that the logits take to be read, ``4 G V`` bytes in float32: once for greedy
rows and twice for rows that draw. At 256 rows of 152 thousand tokens that is 156 MB each time, or
36 us at 4.3 TB/s. One row is read by as many programs as it has chunks, and there the floor is the
launches themselves. What launches tell each other takes 86 KB for each row of so many tokens.

A list of the 512 likeliest blocks is enough for nearly all that language models say. Where it is
not (a hot temperature, half of a flat row) a row is read 8 times more. That leaves its bound except
where more than a few tokens lie within 2**-21 of the range of its logits; then ``search`` goes on,
with one program that reads the whole row, in each pass dividing the range by 8. It does the same,
about 10 times, for a top_k of thousands that leaves fewer tokens than min_p does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
from torch import Tensor

from dovetail.core.contracts.launches import launcher
from dovetail.core.errors import UnsupportedError
from dovetail.platforms.gpu.ops import choice_kernels as kernels
from dovetail.platforms.gpu.ops.lists import settle
from dovetail.platforms.gpu.ops.searches import narrow, search
from dovetail.platforms.torch.sampling.weights import Controls, unit

__all__ = ["choose"]

_CHUNK = 2048
"""Tokens whose mass is known while a row is drawn."""
_SPAN, _ENOUGH = 4, 4096
"""Chunks of one program, where there are enough of them; else programs have one each."""
_CHUNK_WARPS = 8
"""Of such a program: measured, see ``docs/measurements/cuda.md``."""
_BLOCK = 64  # a power of two
"""Tokens of which only the likeliest counts when a row is planned."""
_SOME, _FEW_BLOCKS = 128, 16
"""Blocks of a program that lists, and how many of them it looks into at a time."""
_FEW = 512
"""Blocks that are looked into where top_k does not say."""
_LIST = 4096
"""The most tokens that a list may hold; rows of no more are listed whole."""
_TILE, _LIST_TILE = 1024, 512
"""Tokens of a row that is searched, and of a list, that are looked at together."""
_PART, _WIDER, _MANY_PARTS = 8192, 3, 2048
"""Tokens of a program that shares a search with others, a multiple of ``_CHUNK``; how many times
as many it has where that makes more programs: most have nothing to do, and cost their start."""
_ROUNDS, _PIVOTS = 7, 8
"""Of a search that is shared."""
_MOST_BITS = 43
"""Of a weight that is the sum of two numbers, of which eight each add up exactly in float32."""
_FOUND = 64
"""Room for the pivots of all rounds: a power of two."""

_SHIFTS = {torch.float32: 0, torch.bfloat16: 16, torch.float16: 13}
"""Bits at the end of a float32 that logits of a dtype never have."""


def choose(
    logits_GV: Tensor, controls: Controls | None, *, restricts: bool = True
) -> tuple[Tensor, Tensor]:
    """A ``ChooseFixed`` for logits in float32, bfloat16 or float16.

    Raises:
        UnsupportedError: Logits of another dtype.
    """
    if logits_GV.dtype not in _SHIFTS:
        known = ", ".join(map(str, _SHIFTS))
        raise UnsupportedError(f"Tokens are chosen from {known} logits, not {logits_GV.dtype}.")
    rows = len(logits_GV)
    x = logits_GV if logits_GV.stride(1) == 1 else logits_GV.contiguous()
    state = _State.of(rows, x.shape[1], x.device)
    if rows:
        _launch(x, controls, state, restricts)
    return state.tokens, state.finite


@dataclass(frozen=True)
class _State:
    """What launches tell each other, on the device."""

    tokens: Tensor
    """(G,) int64"""
    finite: Tensor
    """(G,) bool"""
    peak: Tensor
    """(G,) float32"""
    bound: Tensor
    """(G,) int64: the rank that the kept, or the listed, reach."""
    stage: Tensor
    """(G,) int32: what the row still needs, of ``stages``."""
    listed: Tensor
    """(G,) int32: tokens that should be in the list, which may be too short."""
    tops: Tensor
    """(G, B) int64: the highest rank in each block."""
    masses: Tensor
    """(G, C) int64: of each chunk."""
    numbers: Tensor
    """(G, C) int32: tokens of each chunk that pass min_p."""
    ranks: Tensor
    """(G, L) int64: the list."""
    weights: Tensor
    """(G, L) int64"""
    pivots: Tensor
    """(G, F) int64: of each round, one after another."""
    found_numbers: Tensor
    """(G, F) int32: tokens that reach each pivot."""
    found_masses: Tensor
    """(G, F) int64: and their mass."""

    @classmethod
    def of(cls, rows: int, vocab: int, device: torch.device) -> _State:
        chunks = triton.cdiv(vocab, _CHUNK)
        shapes = {
            "tokens": ((), torch.int64),
            "finite": ((), torch.bool),
            "peak": ((), torch.float32),
            "bound": ((), torch.int64),
            "stage": ((), torch.int32),
            "listed": ((), torch.int32),
            "tops": ((chunks * (_CHUNK // _BLOCK),), torch.int64),
            "masses": ((chunks,), torch.int64),
            "numbers": ((chunks,), torch.int32),
            "ranks": ((_LIST,), torch.int64),
            "weights": ((_LIST,), torch.int64),
            "pivots": ((_FOUND,), torch.int64),
            "found_numbers": ((_FOUND,), torch.int32),
            "found_masses": ((_FOUND,), torch.int64),
        }
        return cls(
            **{
                name: torch.empty((rows, *shape), dtype=dtype, device=device)
                for name, (shape, dtype) in shapes.items()
            }
        )


def _pointers(of: _State | Controls) -> dict[str, Tensor]:
    return {f"{f.name}_ptr": getattr(of, f.name).contiguous() for f in fields(of)}


def _launch(x: Tensor, controls: Controls | None, state: _State, restricts: bool) -> None:
    rows, vocab = x.shape
    chunks, blocks = triton.cdiv(vocab, _CHUNK), triton.cdiv(vocab, _BLOCK)
    span = _SPAN if rows * chunks >= _ENOUGH else 1
    part = _PART * (_WIDER if rows * triton.cdiv(vocab, _PART) > _MANY_PARTS else 1)
    of_spans, of_parts = (rows, triton.cdiv(chunks, span)), (rows, triton.cdiv(vocab, part))
    of_blocks = (rows, triton.cdiv(blocks, _SOME))
    pointers = _pointers(state) | ({} if controls is None else _pointers(controls))
    constants = {
        "VOCAB": vocab,
        "ID_BITS": vocab.bit_length(),
        "SHIFT": _SHIFTS[x.dtype],
        "UNITS": unit(vocab),
        "LOW_BITS": _low_bits(unit(vocab)),
        "CHUNKS": chunks,
        "CHUNK": _CHUNK,
        "SPAN": span,
        "COLUMNS": triton.next_power_of_2(chunks),
        "BLOCK_BITS": _BLOCK.bit_length() - 1,
        "BLOCKS": blocks,
        "TOPS": state.tops.shape[1],
        "USUAL": min(_FEW, max(1, blocks * 3 // 4)),
        "LIST": _LIST,
        "PART": part,
        "FOUND": _FOUND,
    }
    known = {**pointers, **constants, "x_ptr": x, "row_step": x.stride(0)}
    of_list = {"PIVOTS": 4, "TILE": _LIST_TILE, "num_warps": 8}
    of_row = {"PIVOTS": _PIVOTS, "TILE": _TILE, "num_warps": 8}
    shared = {"num_warps": _CHUNK_WARPS}

    def launch(kernel: Any, grid: tuple[int, ...], **others: int) -> None:
        taken = {name: known[name] for name in kernel.arg_names if name in known}
        launcher(kernel, grid)(**taken, **others)

    launch(kernels.peaks, of_spans, **shared)
    if controls is None:
        launch(kernels.crown, (rows,), TILE=_TILE)
        return
    launch(kernels.plan, (rows,), **of_list)
    launch(kernels.tally, of_spans, RESTRICTS=restricts, **shared)
    if restricts:
        launch(kernels.enlist, of_blocks, SOME=_SOME, FEW_BLOCKS=_FEW_BLOCKS)
        launch(settle, (rows,), **of_list)
        for number in range(_ROUNDS):
            launch(narrow, of_parts, round=number, **of_row)
        launch(search, (rows,), rounds=_ROUNDS, **of_row)
        launch(kernels.measure, of_parts)
    launch(kernels.draw, (rows,))


def _low_bits(units: float) -> int:
    """Of a weight, for ``masses_of``: half of its bits; 0 where eight halves are not exact."""
    bits = int(units).bit_length() - 1
    return (bits + 1) // 2 if bits <= _MOST_BITS else 0
