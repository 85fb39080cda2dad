"""AITER, AMD's own kernels, over a paged cache.

Signatures and rules are those of amd-aiter 0.1.7.post2.dev18: ``mha_batch_prefill_func`` and
``paged_attention_ragged``, with the sources of their kernels that come with them
(``csrc/py_itfs_ck/mha_batch_prefill_kernels.cu``, ``csrc/cpp_itfs/pa/pa_kernels.cuh``). Checked
against emulations of these only: nothing of it has run on a GPU yet.

A row that decodes names its pages. Where a layer has a window, the row names the positions in it,
each a page by itself; so do prompts, whose kernel knows no other pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dovetail.attention_backends.pages import (
    Library,
    PagedAttention,
    PagedPlan,
    Slots,
    alone,
    page_runs,
    refuses_need,
)
from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.errors import ConfigError
from dovetail.core.types import IntArray

__all__ = ["AiterAttention"]

_TARGETS = ("gfx942", "gfx950")
_HEAD_SIZES = (64, 128)
_BLOCK_SIZES = (16, 32)
_GROUP = 16
"""Query heads of a KV head that are computed together. More are split into equal parts."""
_PART = 256
"""Positions of a row that are summed up by themselves."""
_BEYOND = 256
"""Positions named behind the last: kernels read whole tiles of them, of 128, and the next."""
_MOST_ENTRIES = 2**31
"""Of the keys of a layer: the prompts' kernel counts them in 32 bits."""


class _Positions(NamedTuple):
    """The slots of rows' last positions, one row after another."""

    starts: Tensor
    """(R + 1,) int32"""
    slots: Tensor
    """Flat, int32. Behind the last come slots that may be read."""


@dataclass
class _Plan(PagedPlan):
    """A step."""

    need: AttentionNeed
    lens_R: Tensor
    """Positions of each row, at least 1."""
    last_lens_R: Tensor
    """Of them in its last page."""
    query_starts: Tensor
    """(R + 1,)"""
    page_starts: Tensor
    """(R + 1,) where each row's pages begin in ``pages``."""
    pages: Tensor
    """Flat; longer than what the step has."""
    longest: int
    """Positions of the longest row that the plan may be used for."""
    longest_query: int
    num_positions: int
    """Of all rows."""
    positions: dict[int | None, _Positions] = field(default_factory=dict)
    """Those that a window shows to a row's last token; None: all of them."""

    def begin(self, layer: int) -> None:
        """The step's first layer finds positions for all layers, so that a replay has its own."""
        if self.slots.begins(layer):
            self.positions = {window: self._last(window) for window in self._windows()}

    def _windows(self) -> set[int | None]:
        if not self.alone:
            return {None}
        return {spec.window for spec in self.need.specs if spec.window is not None}

    def _last(self, window: int | None) -> _Positions:
        taken_R, count = self.lens_R, self.num_positions
        if window is not None:
            taken_R, count = taken_R.clamp(max=window), len(taken_R) * min(window, self.longest)
        ends = taken_R.cumsum(0, dtype=torch.int32)
        place = torch.arange(count + _BEYOND, dtype=torch.int32, device=ends.device)
        row = torch.searchsorted(ends, place, right=True, out_int32=True).clamp(max=len(ends) - 1)
        from_end = (ends[row] - place).clamp(min=1)
        position = self.lens_R[row] - from_end
        size = self.need.block_size
        page = self.pages[self.page_starts[row] + position // size]
        return _Positions(functional.pad(ends, (1, 0)), page * size + position % size)


class AiterAttention(PagedAttention[_Plan]):
    """AITER, for AMD's gfx942 and gfx950 (Instinct MI300 and MI350).

    Args:
        device: Of the tensors.
        target: The GPU's instruction set; None: there is no GPU.
        hip: The version of HIP that torch was built for.
    """

    name = "aiter"
    plan_type = _Plan
    library = Library(
        module="aiter",
        install="AMD's wheels, https://github.com/ROCm/aiter/releases, or pip install amd-aiter",
        functions=("mha_batch_prefill_func", "paged_attention_ragged"),
    )

    def __init__(self, device: torch.device, target: str | None, hip: str | None) -> None:
        super().__init__(device)
        self._target, self._hip = target, hip
        self._one = torch.ones(1, device=device)
        self._partial = [torch.zeros(0, dtype=torch.uint8, device=device)]
        """Memory for sums over parts of rows. All that was ever taken: recorded steps have it."""

    def refuses(self, need: AttentionNeed) -> str | None:
        """Serves 16-bit models with heads of 64 or 128 entries, without ALiBi."""
        reason = self._refuses_gpu() or refuses_need(need)
        if reason is not None:
            return reason
        if need.block_size not in _BLOCK_SIZES:
            return f"its KV blocks have {_either(_BLOCK_SIZES)} positions, not {need.block_size}"
        odd = sorted(need.head_sizes - set(_HEAD_SIZES))
        if odd:
            return f"its heads have {_either(_HEAD_SIZES)} entries, not {odd[0]}"
        for spec in need.specs:
            group = spec.num_heads // spec.num_kv_heads
            if group % -(-group // _GROUP):
                return f"it cannot split {group} query heads of a KV head into equal parts"
        return self.library.missing()

    def _refuses_gpu(self) -> str | None:
        if self._target is None:
            return f"it needs an AMD GPU: {_either(_TARGETS)}"
        if self._target not in _TARGETS:
            return f"it is for {_either(_TARGETS)}, not {self._target}"
        if self._target == "gfx950" and str(self._hip).startswith("7.2."):
            # So say AITER's own tests of this kernel, which leave these cases out.
            return "ROCm 7.2 compiles its causal kernels wrongly for gfx950"
        return None

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> Tensor:
        """(2, B, P, K, E), of zeros.

        Raises:
            ConfigError: A layer has more keys than the kernels can count.
        """
        block = need.block_size * spec.num_kv_heads * spec.head_size
        if num_blocks * block > _MOST_ENTRIES:
            raise ConfigError(
                f"Attention backend {self.name} has room for {_MOST_ENTRIES // block} KV blocks"
                f" of these layers, not {num_blocks}. Say"
                f" --num-gpu-blocks-override {_MOST_ENTRIES // block}, or take another backend."
            )
        return super().allocate(spec, need, num_blocks)

    def host_plan(self, batch: Batch, need: AttentionNeed) -> tuple[IntArray, ...]:
        """Slots (T,), and the arrays of ``_Plan``."""
        runs = page_runs(batch, need.block_size)
        slots = batch.slots(need.block_size).astype(np.int32, copy=False)
        last = runs.last_page_lens(need.block_size)
        return slots, runs.lens, last, batch.query_starts, runs.starts, runs.pages

    def _planned(
        self, arrays: Sequence[Tensor], batch: Batch, need: AttentionNeed, longest: int
    ) -> _Plan:
        slots, lens, last, query_starts, page_starts, pages = arrays
        return _Plan(
            slots=Slots(slots, need.specs[0].layer),
            num_real=batch.num_tokens - batch.num_padding,
            alone=alone(batch),
            need=need,
            lens_R=lens,
            last_lens_R=last,
            query_starts=query_starts,
            page_starts=page_starts,
            pages=pages,
            longest=longest,
            longest_query=max(2, int(batch.query_lens.max())),
            num_positions=int(np.maximum(batch.sequence_lens, 1).sum()),
        )

    def _kept(self, v_TKE: Tensor) -> Tensor:
        """Numbers: the kernels multiply by 0 what a row does not see, and blocks keep what is left
        of the requests before, so a value that is none would reach others.
        """
        return v_TKE.nan_to_num()

    def _decode(self, q_RHE: Tensor, cache: Tensor, plan: _Plan, spec: AttentionSpec) -> Tensor:
        plan.begin(spec.layer)
        if spec.window is None:
            starts, pages, longest = plan.page_starts, plan.pages, plan.longest
        else:
            starts, pages = plan.positions[spec.window]
            longest = min(spec.window, plan.longest)
            cache = cache.flatten(1, 2).unsqueeze(2)
        num_parts = -(-longest // _PART)
        out = torch.empty(q_RHE.shape, dtype=q_RHE.dtype, device=q_RHE.device)
        self.library.function("paged_attention_ragged")(
            out,
            self._memory(out.shape[0] * out.shape[1] * num_parts, out.shape[2]),
            q_RHE.contiguous(),
            cache[0],
            cache[1],
            spec.scale,
            starts,
            pages,
            plan.last_lens_R,
            cache.shape[2],
            num_parts,
            None,
            "auto",
            "NHD",
            spec.soft_cap or 0.0,
            self._one,
            self._one,
        )
        return out

    def _memory(self, num_sums: int, head_size: int) -> Tensor:
        """For so many sums of 16-bit entries, each with a float32 weight and maximum."""
        size = num_sums * (2 * head_size + 8)
        if len(self._partial[-1]) < size:
            self._partial.append(torch.empty(size, dtype=torch.uint8, device=self.device))
        return self._partial[-1]

    def _extend(self, q_THE: Tensor, cache: Tensor, plan: _Plan, spec: AttentionSpec) -> Tensor:
        plan.begin(spec.layer)
        starts, slots = plan.positions[None]
        keys, values = cache.flatten(1, 2)
        out: Tensor = self.library.function("mha_batch_prefill_func")(
            q_THE,
            keys,
            values,
            plan.query_starts,
            starts,
            slots,
            plan.longest_query,
            plan.longest,
            softmax_scale=spec.scale,
            logits_soft_cap=spec.soft_cap or 0.0,
            causal=True,
            window_size=(-1, -1) if spec.window is None else (spec.window - 1, 0),
        )
        return out


def _either(choices: Sequence[object]) -> str:
    return " or ".join(map(str, choices))
