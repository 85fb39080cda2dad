"""The backend: allocates, plans, and launches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.attention_backends.kv_cache import bytes_per_block, refuses_kv_dtype
from dovetail.attention_backends.triton.cache import Cache, make_cache
from dovetail.attention_backends.triton.launch import Launch, run
from dovetail.attention_backends.triton.layer import MOST_FEW, MOST_HEADS, Layer
from dovetail.attention_backends.triton.plan import Plan, host_arrays, sent
from dovetail.attention_backends.triton.target import Target, absent, present_target
from dovetail.attention_backends.triton.tuning import HEAD_SIZES
from dovetail.core.batch import Batch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.types import ITEM_SIZE, IntArray

__all__ = ["TritonAttention"]


class TritonAttention:
    """Serves everything but deterministic mode. Made for the device that is current when it works.

    Args:
        device: Of the tensors.
        target: What to launch for; None: what is there.
        launch: What is done with each launch.
    """

    name = "triton"
    records_mixed = True

    def __init__(
        self,
        device: torch.device,
        *,
        target: Target | None = None,
        launch: Callable[[Launch], None] = run,
    ) -> None:
        self.device = device
        self._known_target = target
        self._launch = launch
        self._layers: dict[tuple[Any, ...], Layer] = {}
        self._slopes: dict[tuple[float, ...], Tensor] = {}

    def refuses(self, need: AttentionNeed) -> str | None:
        """Serves heads of up to 256 entries, on GPUs."""
        if need.deterministic:
            return "into how many parts its sums are cut depends on the number of rows"
        for spec in need.specs:
            if spec.head_size > HEAD_SIZES[-1]:
                return f"its heads have up to {HEAD_SIZES[-1]} entries, not {spec.head_size}"
            if spec.num_heads > MOST_HEADS * spec.num_kv_heads:
                return f"up to {MOST_HEADS} query heads share a KV head, not {spec.num_heads}"
            if spec.scale <= 0:
                return f"scores have a positive scale, not {spec.scale}"
        if need.dtype not in ITEM_SIZE:
            return f"it computes in {', '.join(ITEM_SIZE)}, not {need.dtype}"
        return refuses_kv_dtype(need) or self._absent()

    def _absent(self) -> str | None:
        return None if self._known_target else absent(self.device)

    def bytes_per_block(self, spec: AttentionSpec, need: AttentionNeed) -> int:
        """Keys, values and scales of one block."""
        return bytes_per_block(spec, need)

    def allocate(self, spec: AttentionSpec, need: AttentionNeed, num_blocks: int) -> Cache:
        """See ``cache``."""
        self._slopes_of(spec)
        return make_cache(spec, need, num_blocks, self.device)

    def host_plan(self, batch: Batch, need: AttentionNeed) -> tuple[IntArray, ...]:
        """Everything that depends on values; the block tables come last."""
        return host_arrays(batch, need.block_size)

    def device_plan(self, arrays: Sequence[Any], batch: Batch, need: AttentionNeed) -> Plan:
        """For every step of as many rows and tokens, if all decode, or some tokens are padding.

        Otherwise without launches in vain.
        """
        starts, lens, slots, meta, tables = arrays
        counts = batch.query_lens
        return Plan(
            starts=starts,
            lens=lens,
            slots=slots,
            meta=meta,
            tables=tables,
            num_tokens=batch.num_tokens,
            num_rows=batch.num_rows,
            few=batch.num_padding > 0 or bool(((counts > 0) & (counts <= MOST_FEW)).any()),
            many=batch.num_padding > 0 or int(counts.max()) > 1,
        )

    def plan(self, batch: Batch, need: AttentionNeed) -> Plan:
        """The same over a copy of its own."""
        return self.device_plan(sent(self.host_plan(batch, need), self.device), batch, need)

    def attend(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        cache: Cache,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Tensor, Cache]:
        """Write, then attend. The cache is changed in place."""
        step, layer = _checked(plan), self._layer(q_THE, cache, spec)
        sides = _sides(q_THE, k_TKE, v_TKE)
        self._launch(layer.write(sides, None, (), None, cache, step))
        return self._attend(q_THE, layer, cache, step), cache

    def rotary_attend(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        angles: tuple[Tensor, ...],
        norms: tuple[Tensor, Tensor, float] | None,
        cache: Cache,
        plan: object,
        spec: AttentionSpec,
    ) -> tuple[Tensor, Cache]:
        """Norm, rotate and write in one launch, then attend. The cache is changed in place."""
        step, layer = _checked(plan), self._layer(q_THE, cache, spec)
        turned = q_THE.new_empty(q_THE.shape)
        sides = _sides(q_THE, k_TKE, v_TKE)
        self._launch(layer.write(sides, turned, _dense(angles), norms, cache, step))
        return self._attend(turned, layer, cache, step), cache

    def _attend(self, q: Tensor, layer: Layer, cache: Cache, plan: Plan) -> Tensor:
        out = q.new_empty(q.shape)
        if plan.few or plan.alone:
            self._attend_few(q, out, layer, cache, plan)
        if plan.many and not plan.alone:
            self._launch(layer.prefill(q, out, cache, plan))
        return out

    def _attend_few(self, q: Tensor, out: Tensor, layer: Layer, cache: Cache, plan: Plan) -> None:
        parts = layer.parts(plan)
        if parts == 1:
            self._launch(layer.decode(q, out, None, None, cache, plan))
            return
        shape = (plan.num_rows, layer.few(plan), q.shape[1], parts)
        partial = q.new_empty((*shape, q.shape[2]), dtype=torch.float32)
        weights = q.new_empty(shape, dtype=torch.float32)
        self._launch(layer.decode(q, out, partial, weights, cache, plan))
        self._launch(layer.reduce(out, partial, weights, plan))

    def _layer(self, q: Tensor, cache: Cache, spec: AttentionSpec) -> Layer:
        key = (spec, q.dtype, cache.kv_dtype, cache.keys.shape[2])
        known = self._layers.get(key)
        if known is None:
            known = Layer(*key, self._target(), self._slopes_of(spec))
            self._layers[key] = known
        return known

    def _target(self) -> Target:
        if self._known_target is None:
            self._known_target = present_target(self.device)
        return self._known_target

    def _slopes_of(self, spec: AttentionSpec) -> Tensor | None:
        """ALiBi's slopes for scores in base 2, on the device; copied there once."""
        if spec.alibi_slopes is None:
            return None
        if spec.alibi_slopes not in self._slopes:
            slopes = np.array(spec.alibi_slopes, np.float32) * np.float32(np.log2(np.e))
            self._slopes[spec.alibi_slopes] = torch.from_numpy(slopes).to(self.device)
        return self._slopes[spec.alibi_slopes]

    def copy_blocks(self, caches: Sequence[Cache], pairs: IntArray) -> Sequence[Cache]:
        """Copy in place, in every layer."""
        source, target = torch.from_numpy(pairs).long().to(self.device).unbind(1)
        for cache in caches:
            for part in cache.parts():
                part[target] = part[source]
        return caches


def _checked(plan: object) -> Plan:
    if not isinstance(plan, Plan):
        raise TypeError(f"a plan of another backend: {type(plan).__name__}")
    return plan


def _sides(*sides: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values, whose entries must lie side by side; tokens and heads may not."""
    if any(side.stride(2) != 1 for side in sides):
        strides = ", ".join(str(side.stride()) for side in sides)
        raise ValueError(f"entries of q, k and v must be neighbours in memory; strides: {strides}")
    q, k, v = sides
    return q, k, v


def _dense(angles: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    if len(angles) != 2 or not all(angle.is_contiguous() for angle in angles):
        raise ValueError("angles must be cosines and sines, contiguous, of shape (T, F) each")
    return angles
