"""FlashInfer over a paged cache (Ye et al., 2025, arXiv 2501.01005).

Signatures and rules are those of flashinfer-python 0.7.2.post1, ``decode.py`` and ``prefill.py``.
Of that version decoding was run on an H200 and compared; the wrappers of prompts were run over
plain torch in place of their kernels, all else over emulations of the documented interface.

FlashInfer plans a step on the host: how the keys of its rows are shared out among the GPU's
multiprocessors. So ``host_plan`` does, before every step. A plan holds for layers that are alike
(``Kind``). Steps in which each row has one token go through wrappers in CUDA-graph mode, one for
each number of rows, whose buffers stay where they are; all others through one that prefills.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dovetail.attention_backends.memory import zeros
from dovetail.attention_backends.pages import (
    Library,
    PagedAttention,
    PagedPlan,
    Slots,
    alone,
    longer,
    page_runs,
    pinned,
    refuses_need,
)
from dovetail.core.batch import Batch
from dovetail.core.buckets import StepShape, pad_to
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.errors import InvariantError
from dovetail.core.types import IntArray
from dovetail_cuda.order import Capability

__all__ = ["FlashInferAttention", "decode_rows"]

_LEAST = (8, 0)
_HEAD_SIZES = (64, 128, 256)
_PARTIAL_BYTES = 256 << 20
"""For sums over parts of rows. FlashInfer recommends 128 MiB; models of 64 heads take more."""
_PREFILL_PLAN_BYTES = 8 << 20
"""For one plan, as FlashInfer itself reserves."""
_DECODE_PLAN_BYTES = 1 << 20
"""Of a step in which each row has one token: a few numbers for each part of a row."""
_TENSOR_CORES_FROM = 4
"""Query heads of a KV head from which decoding pays on tensor cores. Fewer have kernels without."""


class Kind(NamedTuple):
    """What a plan depends on, besides the step."""

    num_heads: int
    num_kv_heads: int
    head_size: int
    scale: float
    window: int | None
    soft_cap: float | None

    @classmethod
    def of(cls, spec: AttentionSpec) -> Kind:
        """A layer's."""
        sizes = (spec.num_heads, spec.num_kv_heads, spec.head_size)
        return cls(*sizes, spec.scale, spec.window, spec.soft_cap)

    def arguments(self, need: AttentionNeed) -> dict[str, Any]:
        """Those that both wrappers' ``plan`` take by name."""
        dtype = getattr(torch, need.dtype)
        return {
            "page_size": need.block_size,
            "sm_scale": self.scale,
            "window_left": -1 if self.window is None else self.window - 1,
            "logits_soft_cap": self.soft_cap or 0.0,
            "q_data_type": dtype,
            "kv_data_type": dtype,
        }


def decode_rows(count: int) -> int:
    """The number of rows that a step of ``count`` rows is padded to, so that they are few.

    The sizes that are recorded are among these, but for the largest one.
    """
    if count <= 4:
        return 1 << (count - 1).bit_length()
    step = 8 if count <= 64 else 16 if count <= 256 else 32
    return -(-count // step) * step


@dataclass(frozen=True)
class _Planner:
    """A wrapper of FlashInfer. It plans in memory of its own, from which the device copies."""

    wrapper: Any
    copied: torch.cuda.Event | None
    """Behind that copy; None where the host is the device."""

    @classmethod
    def around(cls, wrapper: Any, device: torch.device) -> _Planner:
        event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        return cls(wrapper, event)

    def plan(self, *arrays: Tensor, **arguments: Any) -> None:
        """Wait for the copy of the plan before, which lies in the same memory, and plan anew."""
        if self.copied is not None:
            self.copied.synchronize()
        self.wrapper.plan(*arrays, **arguments)
        if self.copied is not None:
            self.copied.record()


@dataclass(frozen=True)
class _Decoders:
    """For one number of rows: a wrapper for each kind of layer, and the KV blocks they read."""

    num_rows: int
    planners: Sequence[_Planner]
    pages: Tensor


@dataclass
class _Needed:
    """All wrappers for one need."""

    need: AttentionNeed
    kinds: Sequence[Kind]
    kind_of: Mapping[int, int]
    """Index into ``kinds``, by layer."""
    prefillers: Sequence[_Planner] = ()
    decoders: dict[int, _Decoders] = field(default_factory=dict)
    """By number of rows. They are kept: recorded steps read their buffers."""
    num_prefills: int = 0


@dataclass
class _Plan(PagedPlan):
    """A step."""

    needed: _Needed
    number: int
    """Of the plan that the prefilling wrappers hold."""


class FlashInferAttention(PagedAttention[_Plan]):
    """FlashInfer, for GPUs of compute capability 8.0 and more.

    Args:
        device: Of the tensors.
        capability: The GPU's; None: there is none.
    """

    name = "flashinfer"
    plan_type = _Plan
    library = Library(module="flashinfer", install="pip install flashinfer-python")

    def __init__(self, device: torch.device, capability: Capability | None) -> None:
        super().__init__(device)
        self._capability = capability
        self._known: list[_Needed] = []
        self._partial: Tensor | None = None
        self._plans: list[Tensor] = []
        """Memory of the device for the plan of each kind; each step's wrappers write it anew."""
        self._pages = torch.zeros(0, dtype=torch.int32, device=device)

    def refuses(self, need: AttentionNeed) -> str | None:
        """Serves 16-bit models of the usual head sizes, without ALiBi."""
        if self._capability is None:
            return "it needs an NVIDIA GPU of compute capability 8.0 or more"
        if self._capability < _LEAST:
            major, minor = self._capability
            return f"it is for compute capability 8.0 and more, not {major}.{minor}"
        reason = refuses_need(need)
        if reason is not None:
            return reason
        odd = sorted(need.head_sizes - set(_HEAD_SIZES))
        if odd:
            return f"its heads have {', '.join(map(str, _HEAD_SIZES))} entries, not {odd[0]}"
        return self.library.missing()

    def host_plan(self, batch: Batch, need: AttentionNeed) -> tuple[IntArray, ...]:
        """Plan the step with FlashInfer. What it does not send itself are the slots (T,)."""
        needed = self._needed(need)
        if alone(batch):
            self._plan_decode(batch, needed)
        else:
            self._plan_prefill(batch, needed)
        return (batch.slots(need.block_size).astype(np.int32, copy=False),)

    def _needed(self, need: AttentionNeed) -> _Needed:
        for known in self._known:
            if known.need is need or known.need == need:
                return known
        kinds = list(dict.fromkeys(map(Kind.of, need.specs)))
        kind_of = {spec.layer: kinds.index(Kind.of(spec)) for spec in need.specs}
        self._known.append(_Needed(need, kinds, kind_of))
        return self._known[-1]

    def _plan_decode(self, batch: Batch, needed: _Needed) -> None:
        size, width = needed.need.block_size, batch.block_tables.shape[1]
        rows = decode_rows(batch.num_rows)
        runs = page_runs(pad_to(batch, StepShape(rows, rows, width)), size)
        decoders = self._decoders(rows, int(np.diff(runs.starts).max()), needed)
        lens, starts, last = (
            pinned(array, self.device)
            for array in (runs.lens, runs.starts, runs.last_page_lens(size))
        )
        # The wrappers copy their arrays from the host without waiting, all but this one.
        pages = decoders.pages[: len(runs.pages)]
        pages.copy_(pinned(runs.pages, self.device), non_blocking=True)
        for kind, planner in zip(needed.kinds, decoders.planners, strict=True):
            planner.plan(
                starts,
                pages,
                last,
                num_qo_heads=kind.num_heads,
                num_kv_heads=kind.num_kv_heads,
                head_dim=kind.head_size,
                seq_lens=lens,
                **kind.arguments(needed.need),
            )

    def _decoders(self, rows: int, width: int, needed: _Needed) -> _Decoders:
        """The wrappers for some number of rows, the longest of which has ``width`` blocks."""
        known, need = needed.decoders.get(rows), needed.need
        if known is not None and len(known.pages) >= rows * width:
            return known
        if need.max_len is not None:
            longest = -(-need.max_len // need.block_size)
            if width > longest:
                raise InvariantError(
                    "engine", f"a row of {width} blocks where the most is {longest}"
                )
            width = longest
        if len(self._pages) < rows * width:
            self._pages = torch.zeros(rows * width, dtype=torch.int32, device=self.device)
        pages = self._pages
        planners = [
            self._decoder(rows, kind, index, pages) for index, kind in enumerate(needed.kinds)
        ]
        needed.decoders[rows] = _Decoders(rows, planners, pages)
        return needed.decoders[rows]

    def _decoder(self, rows: int, kind: Kind, index: int, pages: Tensor) -> _Planner:
        def buffer(size: int) -> Tensor:
            return torch.zeros(size, dtype=torch.int32, device=self.device)

        group = kind.num_heads // kind.num_kv_heads
        wrapper = self.library.function("BatchDecodeWithPagedKVCacheWrapper")(
            self._partial_sums(),
            "NHD",
            use_cuda_graph=True,
            use_tensor_cores=group >= _TENSOR_CORES_FROM,
            paged_kv_indptr_buffer=buffer(rows + 1),
            paged_kv_indices_buffer=pages,
            paged_kv_last_page_len_buffer=buffer(rows),
            backend="fa2",
        )
        return self._placed(wrapper, index, _DECODE_PLAN_BYTES)

    def _placed(self, wrapper: Any, index: int, size: int) -> _Planner:
        """The wrapper with its plan in memory that all wrappers for a kind of layer share.

        They may: a step's plan is made right before the step, and steps follow one another.
        """
        while len(self._plans) <= index:
            self._plans.append(zeros((_PREFILL_PLAN_BYTES,), "uint8", self.device))
        wrapper.reset_workspace_buffer(self._partial_sums(), self._plans[index][:size])
        return _Planner.around(wrapper, self.device)

    def _partial_sums(self) -> Tensor:
        if self._partial is None:
            self._partial = zeros((_PARTIAL_BYTES,), "uint8", self.device)
        return self._partial

    def _plan_prefill(self, batch: Batch, needed: _Needed) -> None:
        size = needed.need.block_size
        if not needed.prefillers:
            make = self.library.function("BatchPrefillWithPagedKVCacheWrapper")
            needed.prefillers = [
                self._placed(make(self._partial_sums(), "NHD"), index, _PREFILL_PLAN_BYTES)
                for index in range(len(needed.kinds))
            ]
        # Rows without tokens stand behind all others.
        count = int(np.count_nonzero(batch.query_lens))
        runs = page_runs(batch, size)
        arrays = (
            batch.query_starts[: count + 1],
            runs.starts[: count + 1],
            runs.pages[: runs.starts[count]],
            runs.last_page_lens(size)[:count],
        )
        on_host = [pinned(array, self.device) for array in arrays]
        lens = pinned(runs.lens[:count], self.device)
        for kind, planner in zip(needed.kinds, needed.prefillers, strict=True):
            planner.plan(
                *on_host,
                num_qo_heads=kind.num_heads,
                num_kv_heads=kind.num_kv_heads,
                head_dim_qk=kind.head_size,
                causal=True,
                seq_lens=lens,
                **kind.arguments(needed.need),
            )
        needed.num_prefills += 1

    def _planned(
        self, arrays: Sequence[Tensor], batch: Batch, need: AttentionNeed, longest: int
    ) -> _Plan:
        """The step that ``host_plan`` has planned; how long rows become, its wrappers know."""
        needed = self._needed(need)
        return _Plan(
            slots=Slots(arrays[0][: batch.num_tokens], need.specs[0].layer),
            num_real=batch.num_tokens - batch.num_padding,
            alone=alone(batch),
            needed=needed,
            number=needed.num_prefills,
        )

    def _decode(self, q_RHE: Tensor, cache: Tensor, plan: _Plan, spec: AttentionSpec) -> Tensor:
        decoders = plan.needed.decoders[decode_rows(len(q_RHE))]
        planner = decoders.planners[plan.needed.kind_of[spec.layer]]
        out: Tensor = planner.wrapper.run(longer(q_RHE, decoders.num_rows), (cache[0], cache[1]))
        return out[: len(q_RHE)]

    def _extend(self, q_THE: Tensor, cache: Tensor, plan: _Plan, spec: AttentionSpec) -> Tensor:
        if plan.number != plan.needed.num_prefills:
            raise InvariantError("engine", "FlashInfer has planned another step since")
        planner = plan.needed.prefillers[plan.needed.kind_of[spec.layer]]
        out: Tensor = planner.wrapper.run(q_THE, (cache[0], cache[1]))
        return out
