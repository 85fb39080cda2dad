"""What backends over kernels of other packages share: a paged cache, and steps as they want them.

The cache of a layer is (2, B, P, K, E), keys and then values: pages as FlashAttention takes them,
and FlashInfer and AITER, who call it NHD.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dovetail.attention_backends.memory import zeros
from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.errors import InvariantError
from dovetail.core.types import ITEM_SIZE, IntArray

__all__ = [
    "Library",
    "PageRuns",
    "PagedAttention",
    "PagedPlan",
    "Slots",
    "alone",
    "longer",
    "must_not_record",
    "page_runs",
    "pinned",
    "refuses_need",
]

_DTYPES = ("bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class Library:
    """A package that is used where it is installed."""

    module: str
    """What is imported."""
    install: str
    """The command that installs it, or where it is to be had."""
    functions: tuple[str, ...] = ()
    """Some that it has, where another package might have its name."""

    def missing(self) -> str | None:
        """Why it cannot be used; None if it is imported now."""
        try:
            found = import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name == self.module:
                return f"package {self.module} is not installed: {self.install}"
            return f"package {self.module} lacks module {error.name}: {self.install}"
        except Exception as error:
            return f"package {self.module} cannot be imported: {type(error).__name__}: {error}"
        lacking = [name for name in self.functions if not hasattr(found, name)]
        if lacking:
            what = f"has no {lacking[0]}, so it is too old or another of that name"
            return f"package {self.module} {what}: {self.install}"
        return None

    def function(self, name: str) -> Callable[..., Any]:
        """One of the package's, which is imported."""
        found: Callable[..., Any] = getattr(import_module(self.module), name)
        return found


def refuses_need(need: AttentionNeed) -> str | None:
    """Why none of these libraries serves a need; None if nothing speaks against it here."""
    if need.deterministic:
        return "into how many parts its sums are cut depends on the other rows"
    if need.dtype not in _DTYPES:
        return f"it computes in {' and '.join(_DTYPES)}, not {need.dtype}"
    if need.kv_dtype != need.dtype:
        return f"its cache has the dtype of the queries, {need.dtype}, not {need.kv_dtype}"
    if "alibi" in need.features:
        return "it is given no ALiBi slopes"
    return None


class Slots:
    """Where the tokens of a step go, as torch indexes: made by the step's first layer, so that a
    replay makes it anew.

    Args:
        slots_T: (T,) int32, on the device.
        first_layer: The number of the layer that attends first.
    """

    def __init__(self, slots_T: Tensor, first_layer: int) -> None:
        self._slots_T = slots_T
        self._first_layer = first_layer
        self._index_T: Tensor | None = None

    def begins(self, layer: int) -> bool:
        """Whether a layer is the first of a step."""
        return layer == self._first_layer

    def index(self, layer: int) -> Tensor:
        """(T,) int64"""
        if self.begins(layer):
            self._index_T = self._slots_T.long()
        if self._index_T is None:
            raise InvariantError(
                "engine", f"layer {layer} attends before layer {self._first_layer}"
            )
        return self._index_T


class PageRuns(NamedTuple):
    """The KV blocks of R rows, one row after another (compressed sparse rows)."""

    lens: IntArray
    """(R,) positions of each row, at least 1."""
    starts: IntArray
    """(R + 1,) where its blocks begin."""
    pages: IntArray
    """Flat. A row that has no tokens has one: block 0, which is nobody's."""

    def last_page_lens(self, block_size: int) -> IntArray:
        """(R,) positions in the last block of each row, 1 to the block's size."""
        return (self.lens - 1) % block_size + 1


def page_runs(batch: Batch, block_size: int) -> PageRuns:
    """The blocks that the rows of a step have a token in."""
    lens = np.maximum(batch.sequence_lens, 1).astype(np.int32)
    counts = -(-lens // block_size)
    starts = np.zeros(len(lens) + 1, np.int32)
    np.cumsum(counts, out=starts[1:])
    width = batch.block_tables.shape[1]
    shift = np.arange(len(lens), dtype=np.int64) * width - starts[:-1]
    place = np.arange(starts[-1], dtype=np.int64) + shift.repeat(counts)
    return PageRuns(lens, starts, batch.block_tables.ravel()[place].astype(np.int32, copy=False))


def alone(batch: Batch) -> bool:
    """Whether token i is the one token of row i, or of no row: a step that may be recorded."""
    return batch.num_tokens == batch.num_rows and int(batch.query_lens.max()) == 1


def pinned(array: IntArray, device: torch.device) -> Tensor:
    """An array in memory of the host that the device copies from by itself, where it is another."""
    tensor = torch.from_numpy(np.ascontiguousarray(array, np.int32))
    return tensor if device.type == "cpu" else tensor.pin_memory()


def must_not_record(device: torch.device, why: str) -> None:
    """Raise InvariantError if what is done now is recorded, to be replayed with other data."""
    records = getattr(torch.get_device_module(device), "is_current_stream_capturing", None)
    if records is not None and records():
        raise InvariantError("engine", f"this step cannot be recorded: {why}")


def longer(x_THE: Tensor, count: int) -> Tensor:
    """With zeros behind it, up to so many tokens."""
    missing = count - len(x_THE)
    return functional.pad(x_THE, (0, 0, 0, 0, 0, missing)) if missing else x_THE


@dataclass
class PagedPlan:
    """A step, as ``PagedAttention`` looks at it. Backends add what their kernels read."""

    slots: Slots
    num_real: int
    """Tokens that belong to a row: the first ones."""
    alone: bool
    """Token i is the one token of row i, or of no row."""


StepPlan = TypeVar("StepPlan", bound=PagedPlan)


class PagedAttention(ABC, Generic[StepPlan]):
    """What does not depend on the package: the cache, and how a step goes.

    Steps in which every row decodes have kernels of their own, and may be recorded; all others are
    planned and attended one by one.

    Args:
        device: Of the tensors.
    """

    records_mixed = False
    plan_type: type[StepPlan]
    """Of its plans."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys and values of one block."""
        vectors = 2 * need.block_size * spec.num_kv_heads
        return vectors * spec.head_size * ITEM_SIZE[need.kv_dtype]

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> Tensor:
        """(2, B, P, K, E), of zeros."""
        shape = (2, num_blocks, need.block_size, spec.num_kv_heads, spec.head_size)
        return zeros(shape, need.kv_dtype, self.device)

    def copy_blocks(self, caches: Sequence[Tensor], pairs: IntArray) -> Sequence[Tensor]:
        """Copy in place, in every layer."""
        source, target = torch.from_numpy(pairs).long().to(self.device).unbind(1)
        for cache in caches:
            cache[:, target] = cache[:, source]
        return caches

    @abstractmethod
    def host_plan(self, batch: Batch, need: AttentionNeed) -> tuple[IntArray, ...]:
        """See ``RecordableAttention``."""

    @abstractmethod
    def _planned(
        self, arrays: Sequence[Tensor], batch: Batch, need: AttentionNeed, longest: int
    ) -> StepPlan:
        """The plan over the arrays of ``host_plan``, on the device.

        Args:
            arrays: int32.
            batch: The step.
            need: Of the layers.
            longest: Positions of the longest row that the plan may be used for.
        """

    def device_plan(self, arrays: Sequence[Tensor], batch: Batch, need: AttentionNeed) -> StepPlan:
        """For every step of as many rows, if each has one token; else for this one alone.

        Raises:
            InvariantError: It is not known how long sequences can become.
        """
        if not alone(batch):
            return self._planned(arrays, batch, need, _longest(batch))
        if need.max_len is None:
            raise InvariantError("engine", "a step to be recorded needs AttentionNeed.max_len")
        return self._planned(arrays, batch, need, need.max_len)

    def plan(self, batch: Batch, need: AttentionNeed) -> StepPlan:
        """For this step alone, and where the package plans itself, until the next is planned."""
        arrays = [
            pinned(array, self.device).to(self.device, non_blocking=True)
            for array in self.host_plan(batch, need)
        ]
        return self._planned(arrays, batch, need, _longest(batch))

    def attend(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        cache: Tensor,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Tensor, Tensor]:
        """Write, then attend. The cache is changed in place."""
        if not isinstance(plan, self.plan_type):
            raise TypeError(f"a plan of another backend: {type(plan).__name__}")
        keys, values = cache.flatten(1, 2)
        slots_T = plan.slots.index(spec.layer)
        keys[slots_T] = k_TKE
        values[slots_T] = self._kept(v_TKE)
        if plan.alone:
            return self._decode(q_THE, cache, plan, spec), cache
        must_not_record(self.device, "some row has more than one token")
        out = self._extend(q_THE[: plan.num_real], cache, plan, spec)
        return longer(out, len(q_THE)), cache

    def _kept(self, v_TKE: Tensor) -> Tensor:
        """Values as they are written. Default: as they are."""
        return v_TKE

    @abstractmethod
    def _decode(self, q_RHE: Tensor, cache: Tensor, plan: StepPlan, spec: AttentionSpec) -> Tensor:
        """One token of each row, (R, H, E) in and out."""

    @abstractmethod
    def _extend(self, q_THE: Tensor, cache: Tensor, plan: StepPlan, spec: AttentionSpec) -> Tensor:
        """Any rows, (T, H, E) in and out."""


def _longest(batch: Batch) -> int:
    return max(1, int(batch.sequence_lens.max()))
