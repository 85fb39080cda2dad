"""FlashAttention 3 and 2."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from tests.attention_backends.emulated import HALVES, attend, gathered, need

__all__ = ["flash2_varlen_func", "flash2_with_kvcache", "flash3_with_kvcache"]


def check_flash(q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor) -> None:
    need(q.dtype in HALVES, "only fp16 and bf16")
    need(k.dtype == q.dtype == v.dtype, "query, key and value must have the same dtype")
    need(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "contiguous last dimension")
    need(k.dim() == 4 and k.shape == v.shape, "(num_blocks, page_block_size, nheads_k, headdim)")
    need(k.shape[-1] == q.shape[-1] <= 256, "head dimension at most 256")
    need(q.shape[-1] % 8 == 0, "head_size must be a multiple of 8")
    need(q.shape[-2] % k.shape[2] == 0, "heads of key must divide those of query")
    need(table.dtype == torch.int32 and table.stride(-1) == 1, "page table: int32, contiguous")
    need(lens.dtype == torch.int32 and lens.is_contiguous(), "lengths: int32, contiguous")
    need(table.dim() == 2 and len(table) == len(lens), "(batch_size, max_num_blocks_per_seq)")
    need(bool((lens <= table.shape[1] * k.shape[1]).all()), "rows are longer than their tables")
    need(bool(((table >= 0) & (table < len(k))).all()), "a page that does not exist")


def flash_rows(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, lens: Tensor, starts: list[int], **mask: Any
) -> Tensor:
    """Rows one after another; what belongs to none is garbage, as in memory just taken."""
    out = torch.full_like(q, math.nan)
    for i, (first, last) in enumerate(itertools.pairwise(starts)):
        length = int(lens[i])
        rows = (gathered(side, table[i], length) for side in (k, v))
        out[first:last] = attend(q[first:last], *rows, **mask)
    return out


def flash3_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Any = None,
    v: Any = None,
    qv: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    page_table: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k_new: Any = None,
    max_seqlen_q: int | None = None,
    rotary_seqlens: Any = None,
    q_descale: Any = None,
    k_descale: Any = None,
    v_descale: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    attention_chunk: int = 0,
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    scheduler_metadata: Any = None,
    num_splits: int = 0,
    pack_gqa: bool | None = None,
    sm_margin: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    check_flash(q, k_cache, v_cache, page_table, cache_seqlens)
    assert softmax_scale is not None
    mask = {"scale": softmax_scale, "causal": causal, "left": window_size[0], "cap": softcap}
    if cu_seqlens_q is None:
        need(q.dim() == 4 and len(q) == len(page_table), "(batch_size, seqlen, nheads, headdim)")
        starts = [i * q.shape[1] for i in range(len(q) + 1)]
        flat = flash_rows(
            q.flatten(0, 1), k_cache, v_cache, page_table, cache_seqlens, starts, **mask
        )
        return flat.view(q.shape)
    check_starts(q, cu_seqlens_q, max_seqlen_q, len(page_table))
    starts = cu_seqlens_q.tolist()
    return flash_rows(q, k_cache, v_cache, page_table, cache_seqlens, starts, **mask)


def check_starts(q: Tensor, starts: Tensor, longest: int | None, rows: int) -> None:
    need(q.dim() == 3, "(total_q, nheads, headdim)")
    need(starts.dtype == torch.int32 and starts.is_contiguous(), "cu_seqlens_q: int32, contiguous")
    need(starts.shape == (rows + 1,), "cu_seqlens_q: (batch_size + 1,)")
    need(longest is not None, "max_seqlen_q must be provided if cu_seqlens_q is provided")
    need(bool((starts.diff() <= (longest or 0)).all()), "a row is longer than max_seqlen_q")
    need(int(starts[-1]) <= len(q), "fewer tokens than rows have")


def flash2_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Any = None,
    v: Any = None,
    rotary_cos: Any = None,
    rotary_sin: Any = None,
    cache_seqlens: Any = None,
    cache_batch_idx: Any = None,
    cache_leftpad: Any = None,
    block_table: Any = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Any = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Tensor:
    need(k_cache.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    return flash3_with_kvcache(
        q,
        k_cache,
        v_cache,
        cache_seqlens=cache_seqlens,
        page_table=block_table,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
    )


def flash2_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Any = None,
) -> Tensor:
    need(k.shape[1] % 256 == 0, "Paged KV cache block size must be divisible by 256")
    need(cu_seqlens_k.dtype == torch.int32 and cu_seqlens_k.is_contiguous(), "cu_seqlens_k: int32")
    rows = len(cu_seqlens_k) - 1
    need(max_seqlen_q > 1 or len(q) == rows, "one query token in each row is promised")
    lens = cu_seqlens_k.diff()
    need(bool((lens <= max_seqlen_k).all()), "a row is longer than max_seqlen_k")
    return flash3_with_kvcache(
        q,
        k,
        v,
        cache_seqlens=lens,
        page_table=block_table,
        cu_seqlens_q=cu_seqlens_q,
        max_seqlen_q=max_seqlen_q,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
    )
