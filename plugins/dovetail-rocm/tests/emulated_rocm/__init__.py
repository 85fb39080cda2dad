"""AITER's documented interface over plain torch, on any device.

The parameters are its own, name by name and in their order, and so are the demands on tensors that
its checks and kernels make. Everything is computed the plain way, in float32.
"""

from __future__ import annotations

import itertools
import math
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from tests.attention_backends.emulated import HALVES, attend, gathered, need

__all__ = ["MODULE"]

TILE = 128
"""Positions that the prompts' kernel takes together; it looks up those of the next tile, too."""
PART = 256
"""Positions that the decoding kernel takes together."""


def check_indices(starts: Tensor, indices: Tensor, slots: int, *, beyond: int) -> None:
    """``beyond``: how many are read behind the last row's."""
    for array in (starts, indices):
        need(array.dtype == torch.int32 and array.dim() == 1, "int32 arrays of one axis")
        need(array.is_contiguous(), "contiguous arrays")
    need(bool((starts.diff() >= 1).all()), "every row has a page")
    read = int(starts[-1]) + beyond
    need(read <= len(indices), f"fewer pages than rows have, and {beyond} more")
    need(bool(((indices >= 0) & (indices < slots))[:read].all()), "a page that does not exist")


def check_heads(q: Tensor, k: Tensor, v: Tensor) -> None:
    need(q.dtype in HALVES, "FlashAttention only support fp16 and bf16 data type")
    need(k.dtype == v.dtype == q.dtype, "query, key and value must have the same dtype")
    need(q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "contiguous last dimension")
    need(k.shape == v.shape and k.shape[-1] == q.shape[-1], "as many entries everywhere")
    need(q.shape[1] % k.shape[-2] == 0, "heads of key must divide those of query")


def with_leftovers(out: Tensor, values: Tensor) -> Tensor:
    """Besides, 0 times every value that is read beyond a row."""
    return out + (0.0 * values.float()).sum().to(out.dtype)


def mha_batch_prefill_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    kv_indptr: Tensor,
    kv_page_indices: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    logits_soft_cap: float = 0.0,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Any = None,
    deterministic: bool = False,
    return_lse: bool = False,
    return_attn_probs: bool = False,
    out: Any = None,
) -> Tensor:
    check_heads(q, k, v)
    need(q.dim() == k.dim() == 3, "(total_q, heads, size) and (total_k, heads, size)")
    need(q.shape[-1] <= 128 and q.shape[-1] % 8 == 0, "a head size that has a kernel")
    check_indices(kv_indptr, kv_page_indices, len(k), beyond=2 * TILE)
    need(cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q.is_contiguous(), "cu_seqlens_q: int32")
    need(cu_seqlens_q.shape == kv_indptr.shape, "(batch_size + 1,)")
    need(bool((cu_seqlens_q.diff() <= max_seqlen_q).all()), "a row is longer than max_seqlen_q")
    need(bool((kv_indptr.diff() <= max_seqlen_k).all()), "a row is longer than max_seqlen_k")
    need(int(cu_seqlens_q[-1]) <= len(q), "fewer tokens than rows have")
    assert softmax_scale is not None and causal and max_seqlen_q > 1
    need(window_size in ((-1, -1), (window_size[0], 0)), "nothing is seen behind a causal query")
    mask = {"causal": True, "left": window_size[0], "cap": logits_soft_cap}
    made = torch.full_like(q, math.nan)
    bounds = zip(
        itertools.pairwise(cu_seqlens_q.tolist()),
        itertools.pairwise(kv_indptr.tolist()),
        strict=True,
    )
    for (first, last), (start, end) in bounds:
        mine, others = kv_page_indices[start:end].long(), kv_page_indices[end : end + TILE].long()
        part = attend(q[first:last], k[mine], v[mine], softmax_scale, **mask)
        made[first:last] = with_leftovers(part, v[others])
    return made


def paged_attention_ragged(
    out: Tensor,
    workspace_buffer: Tensor,
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    scale: float,
    kv_indptr: Tensor,
    kv_page_indices: Tensor,
    kv_last_page_lens: Tensor,
    block_size: int,
    max_num_partitions: int,
    alibi_slopes: Any,
    kv_cache_dtype: str,
    kv_cache_layout: str,
    logits_soft_cap: float,
    k_scale: Tensor,
    v_scale: Tensor,
    fp8_out_scale: Any = None,
    partition_size: int = PART,
    mtp: int = 1,
) -> Tensor:
    check_heads(query, key_cache, value_cache)
    need(query.is_contiguous() and out.is_contiguous(), "heads one after another")
    need(out.shape == query.shape and out.dtype == query.dtype, "(num_seqs, num_heads, head_size)")
    need((kv_cache_dtype, kv_cache_layout) == ("auto", "NHD"), "this emulation knows these alone")
    need(key_cache.dim() == 4 and key_cache.shape[1] == block_size, "pages of block_size")
    need(block_size in (1, 16, 32), "pages of up to 32 positions")
    need(query.shape[-1] in (64, 128), "16 entries for each of four warps")
    group = query.shape[1] // key_cache.shape[2]
    need(group % -(-group // 16) == 0, "heads of a group in equal parts")
    check_indices(kv_indptr, kv_page_indices, len(key_cache), beyond=0)
    need(len(kv_indptr) == len(query) + 1, "(num_seqs + 1,)")
    sums = len(query) * query.shape[1] * max_num_partitions
    room = sums * (query.shape[-1] * query.element_size() + 8)
    need(workspace_buffer.nbytes >= room, "a workspace for sums, weights and maxima")
    for each in (k_scale, v_scale):
        need(each.dtype == torch.float32 and each.numel() == 1, "a float32 scale")
    for i, (start, end) in enumerate(itertools.pairwise(kv_indptr.tolist())):
        pages, last = kv_page_indices[start:end], block_size
        if block_size > 1:
            last = int(kv_last_page_lens[i])
        need(1 <= last <= block_size, "1 <= last_page_len <= block_size")
        length = (end - start - 1) * block_size + last
        need(length <= max_num_partitions * partition_size, "a row is longer than its partitions")
        rows = (gathered(side, pages, length) for side in (key_cache, value_cache))
        got = attend(query[i : i + 1], *rows, scale, causal=False, left=-1, cap=logits_soft_cap)
        out[i] = with_leftovers(got, value_cache[int(pages[-1]), last:])[0]
    workspace_buffer.fill_(255)  # nothing that was there may be relied on
    return out


MODULE = ModuleType("aiter")
MODULE.__spec__ = ModuleSpec("aiter", None)
vars(MODULE).update(
    mha_batch_prefill_func=mha_batch_prefill_func, paged_attention_ragged=paged_attention_ragged
)
