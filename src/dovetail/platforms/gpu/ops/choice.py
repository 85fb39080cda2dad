# mypy: disable-error-code="import-untyped"
"""Choosing a token for every row in six launches, whatever the rows ask for.

What is launched depends on the number of rows and tokens only and nothing is looked at on the host,
so that it can stand at the end of a recorded step. Rows that need no more of a launch leave it at
once. The tokens are those of ``platforms/torch/sampling``, by the same whole weights and the same
order; only ``exp`` is the device's own, so a token can differ from torch's where the noise or top_p
falls within a few 2**-24 of the border between two. A row's token does not depend on other rows.

======  ========  ====================================  ========================================
launch  programs  reads                                 finds
======  ========  ====================================  ========================================
peaks   G x C     the logits                            the likeliest token of each block of 64
plan    G         the blocks                            greedy tokens; a bound that enough
                                                        blocks reach, where there is top_k or
                                                        top_p
sift    G x C     the logits of rows that draw          the mass of each chunk of 2048; a list
                                                        of what reaches the bound
settle  G         the lists                             tokens of rows whose list is enough
search  G         the logits of the others, repeatedly  their bound; the mass of their chunks
draw    G         the chunks; the logits of one         the tokens that are still missing
======  ========  ====================================  ========================================

The floor is the time that the logits take to be read, ``4 G V`` bytes in float32: once for greedy
rows and twice for rows that draw. At 256 rows of 152 thousand tokens that is 156 MB each time, or
36 us at 4.3 TB/s. One row is read by as many programs as it has chunks, and there the floor is the
launches themselves. A list of the 512 likeliest blocks is enough for nearly all that language
models say; a row for which it is not (a hot temperature, half of a flat row) is searched by one
program, with 8 pivots in each pass over it, in about 8 passes and at most 17.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import triton
from torch import Tensor

from dovetail.platforms.gpu.ops import choice_kernels as kernels
from dovetail.platforms.torch.sampling.weights import Controls, unit

__all__ = ["choose"]

_CHUNK = 2048
"""Tokens of a program that shares a row with others."""
_BLOCK = 64
"""Tokens of which only the likeliest counts when a row is planned."""
_FEW = 512
"""Blocks that are looked into where top_k does not say."""
_LIST = 4096
"""The most tokens that a list may hold; rows of no more are listed whole."""
_TILE = 1024
"""Tokens of a list, or of a row that is searched, that are looked at together."""


def choose(logits_GV: Tensor, controls: Controls) -> tuple[Tensor, Tensor]:
    """Choose for G rows: the likeliest token where the temperature is below 1e-5, else a draw.

    Args:
        logits_GV: float32, bfloat16 or float16; not changed.
        controls: Of the G rows, on the same device.

    Returns:
        Tokens (G,) int64, 0 where not finite; and (G,) bool: False where a row's logits hold NaN or
        +inf, or are all -inf. As ``platforms/torch/sampling/fixed.py``.
    """
    rows, vocab = logits_GV.shape
    x = logits_GV if logits_GV.stride(1) == 1 else logits_GV.contiguous()
    state = _State.of(rows, vocab, x.device)
    if rows:
        _launch(x, controls, state, rows, vocab)
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
    state: Tensor
    """(G,) int32: what the row still needs."""
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

    @classmethod
    def of(cls, rows: int, vocab: int, device: torch.device) -> _State:
        chunks = triton.cdiv(vocab, _CHUNK)
        shapes = {
            "tokens": ((), torch.int64),
            "finite": ((), torch.bool),
            "peak": ((), torch.float32),
            "bound": ((), torch.int64),
            "state": ((), torch.int32),
            "listed": ((), torch.int32),
            "tops": ((chunks * (_CHUNK // _BLOCK),), torch.int64),
            "masses": ((chunks,), torch.int64),
            "numbers": ((chunks,), torch.int32),
            "ranks": ((_LIST,), torch.int64),
            "weights": ((_LIST,), torch.int64),
        }
        return cls(
            **{
                name: torch.empty((rows, *shape), dtype=dtype, device=device)
                for name, (shape, dtype) in shapes.items()
            }
        )


def _launch(x: Tensor, controls: Controls, state: _State, rows: int, vocab: int) -> None:
    chunks = triton.cdiv(vocab, _CHUNK)
    size = {"VOCAB": vocab, "ID_BITS": vocab.bit_length()}
    chunk = {"CHUNKS": chunks, "CHUNK": _CHUNK}
    units = {"UNITS": unit(vocab)}
    columns = {"COLUMNS": triton.next_power_of_2(chunks)}
    pointers = {
        f"{f.name}_ptr": getattr(of, f.name) for of in (controls, state) for f in fields(of)
    } | {"x_ptr": x, "row_step": x.stride(0)}

    def launch(kernel: Any, grid: tuple[int, ...], **constants: float) -> None:
        taken = {name: pointers[name] for name in kernel.arg_names if name in pointers}
        kernel[grid](**taken, **size, **constants)

    few = min(_FEW, max(1, triton.cdiv(vocab, _BLOCK) * 3 // 4))
    blocks = {"TOPS": state.tops.shape[1], "BLOCKS": triton.cdiv(vocab, _BLOCK), "FEW": few}
    launch(kernels.peaks, (rows, chunks), **chunk, BLOCK=_BLOCK)
    launch(kernels.plan, (rows,), **blocks, LIST=_LIST, PIVOTS=4, TILE=_TILE)
    launch(kernels.sift, (rows, chunks), **units, **chunk, LIST=_LIST)
    launch(kernels.settle, (rows,), **columns, CHUNKS=chunks, LIST=_LIST, PIVOTS=4, TILE=_TILE)
    launch(kernels.search, (rows,), **units, **chunk, PIVOTS=8, TILE=_TILE, num_warps=8)
    launch(kernels.draw, (rows,), **units, **columns, **chunk)
