"""Choosing tokens."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from dovetail.platforms.gpu.ops import choice_kernels as kernels
from dovetail.platforms.torch.sampling.weights import Controls, unit

__all__ = ["choose"]

_CHUNK, _BLOCK, _LIST, _FEW, _TILE = 2048, 64, 4096, 512, 1024


def choose(logits_GV: Tensor, controls: Controls) -> tuple[Tensor, Tensor]:
    """Choose."""
    device = logits_GV.device
    rows, vocab = logits_GV.shape
    chunks = triton.cdiv(vocab, _CHUNK)
    columns = triton.next_power_of_2(chunks)
    bits = max(1, vocab.bit_length())
    blocks = triton.cdiv(vocab, _BLOCK)
    step = logits_GV.stride(0)
    units = unit(vocab)
    tops = torch.empty(rows, chunks * (_CHUNK // _BLOCK), dtype=torch.int64, device=device)
    tokens = torch.empty(rows, dtype=torch.int64, device=device)
    finite = torch.empty(rows, dtype=torch.bool, device=device)
    peak = torch.empty(rows, dtype=torch.float32, device=device)
    bound = torch.empty(rows, dtype=torch.int64, device=device)
    state = torch.empty(rows, dtype=torch.int32, device=device)
    listed = torch.empty(rows, dtype=torch.int32, device=device)
    masses = torch.empty(rows, chunks, dtype=torch.int64, device=device)
    numbers = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    ranks = torch.empty(rows, _LIST, dtype=torch.int64, device=device)
    weights = torch.empty(rows, _LIST, dtype=torch.int64, device=device)
    temperature, floor, top_k, top_p, uniform = controls.temperature, controls.floor, controls.top_k, controls.top_p, controls.uniform
    x = logits_GV
    kernels.peaks[(rows, chunks)](x, tops, step, vocab, bits, chunks, _CHUNK, _BLOCK)
    kernels.plan[(rows,)](tops, temperature, top_k, top_p, tokens, finite, peak, bound, state, listed,
        vocab, bits, tops.shape[1], blocks, min(_FEW, blocks), _LIST, 4, _TILE)
    kernels.sift[(rows, chunks)](x, temperature, floor, peak, bound, state, masses, numbers, listed, ranks, weights, step,
        vocab, bits, units, chunks, _CHUNK, _LIST)
    kernels.settle[(rows,)](top_k, top_p, uniform, tokens, peak, bound, state, masses, numbers, listed, ranks, weights,
        vocab, bits, chunks, columns, _LIST, 4, _TILE)
    kernels.search[(rows,)](x, temperature, floor, top_k, top_p, peak, bound, state, masses, step, vocab, bits, units, chunks, _CHUNK, 8, _TILE)
    kernels.draw[(rows,)](x, temperature, floor, uniform, tokens, peak, bound, state, masses, step, vocab, bits, units, chunks, columns, _CHUNK)
    return tokens, finite
