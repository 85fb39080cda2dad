"""FlashInfer's wrappers of paged caches."""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from tests.attention_backends.emulated import HALVES, attend, gathered, need

__all__ = ["BatchDecodeWithPagedKVCacheWrapper", "BatchPrefillWithPagedKVCacheWrapper", "Wrapper"]


class Wrapper:
    """What FlashInfer's two wrappers share."""

    tickets: ClassVar[Any] = itertools.count(1)
    made: ClassVar[list[Any]] = []
    """Every wrapper, in order."""

    def _begin(self, partial: Tensor, layout: str) -> None:
        need(partial.dtype == torch.uint8 and len(partial) >= 128 << 20, "a workspace of 128 MiB")
        need(layout == "NHD", "this emulation knows NHD")
        self._partial = partial
        self._plan_memory = torch.empty(8 << 20, dtype=torch.uint8)
        self.num_plans = 0
        Wrapper.made.append(self)

    def reset_workspace_buffer(
        self, float_workspace_buffer: Tensor, int_workspace_buffer: Tensor
    ) -> None:
        for memory in (float_workspace_buffer, int_workspace_buffer):
            need(memory.data_ptr() % 16 == 0, "must be 16-byte aligned")
        self._partial, self._plan_memory = float_workspace_buffer, int_workspace_buffer

    def _check_plan(self, arrays: Any, heads: tuple[int, int], size: int, page_size: int) -> None:
        indptr, indices, last = arrays
        for array in arrays:
            need(array.dtype == torch.int32 and array.dim() == 1, "int32 arrays of one axis")
        need(indptr.device.type == last.device.type == "cpu", "a host array saves a wait")
        need(len(indptr) == len(last) + 1 and int(indptr[0]) == 0, "(batch_size + 1,)")
        need(bool((indptr.diff() >= 1).all()), "every request has a page")
        need(len(indices) == int(indptr[-1]), "indices: [indptr[-1]]")
        need(bool(((last >= 1) & (last <= page_size)).all()), "1 <= last_page_len <= page_size")
        need(heads[0] % heads[1] == 0, "num_qo_heads must be a multiple of num_kv_heads")
        need(size in (64, 128, 256, 512), f"Unsupported head_dim: {size}")

    def _note(self, mask: dict[str, Any], q_dtype: Any, kv_dtype: Any, page_size: int) -> None:
        need(q_dtype in HALVES and kv_dtype == q_dtype, "16-bit queries, keys and values")
        self._mask, self._dtype, self._page_size = mask, q_dtype, page_size
        self._ticket = next(self.tickets)
        self._plan_memory[:8].view(torch.int64).fill_(self._ticket)
        self.num_plans += 1

    def _check_run(self, q: Tensor, caches: tuple[Tensor, Tensor], tokens: int) -> None:
        need(self.num_plans > 0, "plan() must be called before run()")
        held = int(self._plan_memory[:8].view(torch.int64))
        need(held == self._ticket, "another wrapper has planned in this memory since")
        need(isinstance(caches, tuple), "(k_cache, v_cache)")
        need(q.dtype == caches[0].dtype == caches[1].dtype == self._dtype, "dtypes of the plan")
        need(
            q.stride(-1) == 1 and q.dim() == 3 and len(q) == tokens, f"{tokens} tokens are planned"
        )
        need(caches[0].dim() == 4 and caches[0].shape[1] == self._page_size, "pages of the plan")

    def _rows(
        self, q: Tensor, caches: Any, starts: list[int], indptr: Any, indices: Any, last: Any
    ) -> Tensor:
        out = torch.full_like(q, math.nan)
        for i, (first, end) in enumerate(itertools.pairwise(starts)):
            pages = indices[int(indptr[i]) : int(indptr[i + 1])]
            length = (len(pages) - 1) * self._page_size + int(last[i])
            rows = (gathered(side, pages, length) for side in caches)
            out[first:end] = attend(q[first:end], *rows, **self._mask)
        return out


class BatchDecodeWithPagedKVCacheWrapper(Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        use_tensor_cores: bool = False,
        paged_kv_indptr_buffer: Any = None,
        paged_kv_indices_buffer: Any = None,
        paged_kv_last_page_len_buffer: Any = None,
        backend: str = "auto",
        jit_args: Any = None,
    ) -> None:
        self._begin(float_workspace_buffer, kv_layout)
        need(use_cuda_graph, "this emulation has the CUDA-graph mode only")
        self.rows = len(paged_kv_last_page_len_buffer)
        need(len(paged_kv_indptr_buffer) == self.rows + 1, "should be batch_size + 1")
        self._buffers = (
            paged_kv_indptr_buffer,
            paged_kv_indices_buffer,
            paged_kv_last_page_len_buffer,
        )
        self.use_tensor_cores = use_tensor_cores

    def plan(
        self,
        indptr: Tensor,
        indices: Tensor,
        last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        pos_encoding_mode: str = "NONE",
        window_left: int = -1,
        window_right: int = 0,
        logits_soft_cap: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        data_type: Any = None,
        sm_scale: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        non_blocking: bool = True,
        block_tables: Any = None,
        seq_lens: Any = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        q_len_per_req: int = 1,
        is_causal: bool | None = None,
    ) -> None:
        arrays, heads = (indptr, indices, last_page_len), (num_qo_heads, num_kv_heads)
        self._check_plan(arrays, heads, head_dim, page_size)
        need(len(last_page_len) == self.rows, "The batch size should be fixed in cudagraph mode")
        need(len(indices) <= len(self._buffers[1]), "less than or equal to the allocated buffer")
        group = num_qo_heads // num_kv_heads
        known = self.use_tensor_cores or group in (1, 2, 3, 4, 6, 8, 16)
        need(known, f"Unsupported group_size: {group}")
        for buffer, array in zip(self._buffers, arrays, strict=True):
            buffer[: len(array)].copy_(array)
        cap = logits_soft_cap or 0.0
        mask = {"scale": sm_scale, "causal": False, "left": window_left, "cap": cap}
        self._note(mask, q_data_type, kv_data_type, page_size)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Any = None,
        q_len_per_req: int | None = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        kv_cache_sf: Any = None,
    ) -> Tensor:
        self._check_run(q, paged_kv_cache, self.rows)
        return self._rows(q, paged_kv_cache, list(range(self.rows + 1)), *self._buffers)


class BatchPrefillWithPagedKVCacheWrapper(Wrapper):
    def __init__(
        self,
        float_workspace_buffer: Tensor,
        kv_layout: str = "NHD",
        use_cuda_graph: bool = False,
        qo_indptr_buf: Any = None,
        paged_kv_indptr_buf: Any = None,
        paged_kv_indices_buf: Any = None,
        paged_kv_last_page_len_buf: Any = None,
        custom_mask_buf: Any = None,
        mask_indptr_buf: Any = None,
        backend: str = "auto",
        jit_args: Any = None,
        jit_kwargs: Any = None,
        variant_owns_mask: bool = False,
    ) -> None:
        self._begin(float_workspace_buffer, kv_layout)
        need(not use_cuda_graph, "this emulation has no CUDA-graph mode")

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        custom_mask: Any = None,
        packed_custom_mask: Any = None,
        causal: bool = False,
        pos_encoding_mode: str = "NONE",
        use_fp16_qk_reduction: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        rope_scale: float | None = None,
        rope_theta: float | None = None,
        q_data_type: Any = "float16",
        kv_data_type: Any = None,
        o_data_type: Any = None,
        non_blocking: bool = True,
        prefix_len_ptr: Any = None,
        token_pos_in_items_ptr: Any = None,
        token_pos_in_items_len: int = 0,
        max_item_len_ptr: Any = None,
        seq_lens: Any = None,
        seq_lens_q: Any = None,
        block_tables: Any = None,
        max_token_per_sequence: int | None = None,
        max_sequence_kv: int | None = None,
        fixed_split_size: int | None = None,
        disable_split_kv: bool = False,
        uniform_q_len: int | None = None,
    ) -> None:
        arrays = (paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        self._check_plan(arrays, (num_qo_heads, num_kv_heads), head_dim_qk, page_size)
        need(
            qo_indptr.dtype == torch.int32 and qo_indptr.device.type == "cpu", "int32, on the host"
        )
        need(len(qo_indptr) == len(paged_kv_indptr), "qo_indptr: (batch_size + 1,)")
        need(bool((qo_indptr.diff() >= 0).all()), "qo_indptr must not fall")
        self._starts = qo_indptr.tolist()
        self._arrays = tuple(array.clone() for array in arrays)
        cap = logits_soft_cap or 0.0
        mask = {"scale": sm_scale, "causal": causal, "left": window_left, "cap": cap}
        self._note(mask, q_data_type, kv_data_type, page_size)

    def run(
        self,
        q: Tensor,
        paged_kv_cache: Any,
        *args: Any,
        q_scale: Any = None,
        k_scale: Any = None,
        v_scale: Any = None,
        out: Any = None,
        lse: Any = None,
        return_lse: bool = False,
        lse_base: str = "log2",
        lse_layout: str = "NH",
        enable_pdl: bool | None = None,
        window_left: int | None = None,
        sinks: Any = None,
        kv_cache_sf: Any = None,
        skip_softmax_threshold_scale_factor: float | None = None,
        use_fp16_softmax: bool | None = None,
        uses_spcompress: bool | None = None,
    ) -> Tensor:
        self._check_run(q, paged_kv_cache, self._starts[-1])
        return self._rows(q, paged_kv_cache, self._starts, *self._arrays)
