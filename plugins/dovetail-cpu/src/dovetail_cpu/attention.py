"""Paged attention by the compiled kernels (native/attention.h), over bfloat16 or a byte each."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from dovetail.attention_backends.kv_cache import bytes_per_block
from dovetail.attention_backends.kv_codec import CODECS
from dovetail.attention_backends.memory import zeros
from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import IntArray
from dovetail_cpu.kernels import HeadsStruct, Kernels, LayerStruct, StepStruct

__all__ = ["NativeAttention", "Plan"]

_MOST_ROWS = 96
"""Query tokens times heads of a task (native/attention.h)."""
_ROWS = 48
"""The number of them that a task is given, if one token has no more heads."""
_MOST_HEAD = 256
_LANES = 16
_LEAST_KEYS = 256
"""Keys that are worth a task of their own."""
_FORMATS = {"bfloat16": 0, "int8": 1, "fp8_e4m3": 2, "fp8_e5m2": 3}
"""Of KV caches, by their numbers in native/codes.h."""
_PART = 2
"""Numbers that a waiting result has besides its values."""


@dataclass(frozen=True)
class _Cache:
    """The KV cache of a layer: (blocks, 2, kv heads, block_size * head_size)."""

    entries: Tensor
    """bfloat16, or codes in uint8."""
    scales: Tensor | None
    """Of codes: (blocks, 2, kv heads, block_size) bfloat16."""
    layer: LayerStruct
    slopes: Tensor | None
    """What ``layer`` points to."""


@dataclass(frozen=True)
class Plan:
    """A step as the kernels read it, and what it points to."""

    step: StepStruct
    held: tuple[IntArray | Tensor, ...]
    num_padding: int


class NativeAttention:
    """Reads keys and values where they lie, once for all query heads that share them.

    Args:
        kernels: For this processor.
    """

    name = "native"

    def __init__(self, kernels: Kernels) -> None:
        self._run = kernels.attend
        self._tape = kernels.tape

    def refuses(self, need: AttentionNeed) -> str | None:
        """Serves bfloat16 and everything that layers ask for but deterministic mode."""
        if need.deterministic:
            return "into how many parts its sums are cut depends on the number of rows"
        if need.dtype != "bfloat16":
            return f"it computes in bfloat16, not {need.dtype}"
        if need.kv_dtype not in _FORMATS:
            return f"it keeps {', '.join(_FORMATS)}, not {need.kv_dtype}"
        if need.block_size % _LANES:
            return f"its blocks have a multiple of {_LANES} positions, not {need.block_size}"
        for spec in need.specs:
            if spec.head_size % _LANES or spec.head_size > _MOST_HEAD:
                return (
                    f"its heads have a multiple of {_LANES} entries up to {_MOST_HEAD},"
                    f" not {spec.head_size}"
                )
            group = spec.num_heads // spec.num_kv_heads
            if group > _MOST_ROWS:
                return f"up to {_MOST_ROWS} query heads share a KV head, not {group}"
        return None

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys, values and scales of one block."""
        return bytes_per_block(spec, need)

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> _Cache:
        """Zeros, whose pages are taken as they are written."""
        sides, host = (num_blocks, 2, spec.num_kv_heads), torch.device("cpu")
        coded = need.kv_dtype in CODECS
        shape = (*sides, need.block_size * spec.head_size)
        entries = zeros(shape, "uint8" if coded else "bfloat16", host)
        scales = zeros((*sides, need.block_size), "bfloat16", host) if coded else None
        slopes = None if spec.alibi_slopes is None else torch.tensor(spec.alibi_slopes)
        layer = LayerStruct(
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_size=spec.head_size,
            block_size=need.block_size,
            window=spec.window or 0,
            slopes=None if slopes is None else slopes.data_ptr(),
            cache=entries.data_ptr(),
            scales=_address(scales),
            format=_FORMATS[need.kv_dtype],
            scale=spec.scale,
            soft_cap=spec.soft_cap or 0.0,
        )
        return _Cache(entries, scales, layer, slopes)

    def plan(self, batch: Batch, need: AttentionNeed) -> Plan:
        """Cut the rows into tasks of about equal work for the threads."""
        group = max(spec.num_heads // spec.num_kv_heads for spec in need.specs)
        num_kv = min(spec.num_kv_heads for spec in need.specs)
        tasks, merges, num_parts = _tasks(batch, group, num_kv, torch.get_num_threads())
        arrays = (
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            batch.slots(need.block_size),
            tasks,
            merges,
        )
        # In one piece of memory, of which one address is asked for.
        flat = np.concatenate([array.ravel() for array in arrays], dtype=np.int32)
        sizes = [4 * array.size for array in arrays]
        places = accumulate(sizes[:-1], initial=flat.ctypes.data)
        room = max(spec.num_kv_heads * (spec.head_size + _PART) for spec in need.specs)
        parts = torch.empty(num_parts * _MOST_ROWS * room)
        step = StepStruct(
            batch.num_tokens,
            len(tasks),
            len(merges),
            batch.block_tables.shape[1],
            *places,
            parts.data_ptr(),
        )
        return Plan(step, (flat, parts), batch.num_padding)

    def attend(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        cache: _Cache,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Tensor, _Cache]:
        """Write, then attend. The cache is changed in place."""
        return self._attend((q_THE, k_TKE, v_TKE), None, None, cache, plan)

    def rotary_attend(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        angles: tuple[Tensor, ...],
        norms: tuple[Tensor, Tensor, float] | None,
        cache: _Cache,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Tensor, _Cache]:
        """Norm, rotate and write, then attend, in one call."""
        return self._attend((q_THE, k_TKE, v_TKE), angles, norms, cache, plan)

    def _attend(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        angles: tuple[Tensor, ...] | None,
        norms: tuple[Tensor, Tensor, float] | None,
        cache: _Cache,
        plan: object,
    ) -> tuple[Tensor, _Cache]:
        if not isinstance(plan, Plan):
            raise TypeError(f"a plan of another backend: {type(plan).__name__}")
        q, k, v = (_with_dense_heads(side) for side in sides)
        cosines = sines = q_norm = k_norm = None
        half, wide, eps = 0, False, 0.0
        if angles is not None:
            cosines, sines = (angle.float().contiguous() for angle in angles)
            half = cosines.shape[1]
        if norms is not None:
            q_norm, k_norm, eps = norms
            wide = q_norm.dtype is torch.float32
        heads = HeadsStruct(
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr(),
            q.stride(0),
            k.stride(0),
            v.stride(0),
            _address(cosines),
            _address(sines),
            half,
            _address(q_norm),
            _address(k_norm),
            wide,
            eps,
        )
        self._tape.keep(heads)
        # Tokens of no row are given nothing, and must be finite.
        out = torch.zeros_like(q) if plan.num_padding else q.new_empty(q.shape)
        self._run(
            ctypes.addressof(cache.layer),
            ctypes.addressof(plan.step),
            ctypes.addressof(heads),
            out.data_ptr(),
        )
        return out, cache

    def copy_blocks(self, caches: Sequence[_Cache], pairs: IntArray) -> Sequence[_Cache]:
        """Copy in place, in every layer."""
        source, target = (torch.from_numpy(side.astype(np.int64)) for side in pairs.T)
        for cache in caches:
            for part in (cache.entries, cache.scales):
                if part is not None:
                    part[target] = part[source]
        return caches


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _with_dense_heads(side: Tensor) -> Tensor:
    """(T, heads, E) whose heads of a token lie one after another."""
    _, _, size = side.shape
    return side if side.stride(2) == 1 and side.stride(1) == size else side.contiguous()


def _tasks(batch: Batch, group: int, num_kv: int, threads: int) -> tuple[IntArray, IntArray, int]:
    """Tasks (n, 6) as in native/attention.h, long rows first, merges (m, 2), and parts."""
    counts, ends = batch.query_lens, batch.sequence_lens
    at_once = max(1, _ROWS // group)
    rows = np.arange(batch.num_rows)
    first, size = np.zeros_like(rows), counts
    if counts.max(initial=1) > at_once:
        pieces = -(-counts // at_once)
        rows = np.repeat(rows, pieces)
        first = (np.arange(len(rows)) - (np.cumsum(pieces) - pieces)[rows]) * at_once
        size = np.minimum(at_once, counts[rows] - first)
    end = batch.context_lens[rows] + first + size
    tasks = np.empty((len(rows), 6), np.int32)
    tasks[:, 0], tasks[:, 1], tasks[:, 2] = rows, first, size
    tasks[:, 3], tasks[:, 4], tasks[:, 5] = 0, end, -1
    if 0 < len(tasks) * num_kv < 2 * threads and int(ends.max()) >= 2 * _LEAST_KEYS:
        return _cut(tasks, -(-2 * threads // (len(tasks) * num_kv)))
    if len(tasks) > 1:
        # Tasks of a row stay together, for they read the same keys.
        tasks = tasks[np.lexsort((-(end * size), rows, -ends[rows]))]
    return tasks, np.zeros((0, 2), np.int32), 0


def _cut(tasks: IntArray, most: int) -> tuple[IntArray, IntArray, int]:
    """Few tasks of many keys: each as up to ``most`` tasks whose results are merged."""
    cut: list[tuple[int, ...]] = []
    merges: list[tuple[int, int]] = []
    num_parts = 0
    for row, first, size, _, end, _ in tasks.tolist():
        count = max(1, min(most, end // _LEAST_KEYS))
        step = -(-end // count // _LANES) * _LANES
        begins = range(0, end, step)
        if len(begins) > 1:
            merges.append((len(cut), len(begins)))
        for begin in begins:
            part = num_parts if len(begins) > 1 else -1
            num_parts += part >= 0
            cut.append((row, first, size, begin, min(end, begin + step), part))
    return np.array(cut), np.array(merges, np.int32).reshape(-1, 2), num_parts
