"""How the kernels are launched for one layer: constants that no step changes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from dovetail.attention_backends.kv_codec import CODECS
from dovetail.attention_backends.triton.cache import Cache
from dovetail.attention_backends.triton.launch import KERNELS, Launch
from dovetail.attention_backends.triton.plan import Plan
from dovetail.attention_backends.triton.target import Target
from dovetail.attention_backends.triton.tuning import Tile, kind_of
from dovetail.core.contracts.attention import AttentionSpec

__all__ = ["MOST_FEW", "MOST_HEADS", "Layer"]

MOST_HEADS = 128
"""Query heads of one KV head, at most: they share a tile."""
MOST_FEW = 8
"""Rows with more query tokens are never attended in parts."""
_LEAST_ROWS = 16
"""Rows of the smallest product that matrix units make."""


def _power(size: int) -> int:
    """The power of two that is not smaller."""
    return 1 << (size - 1).bit_length()


@dataclass(frozen=True)
class Layer:
    """Makes the launches of one kind of layer."""

    spec: AttentionSpec
    dtype: torch.dtype
    kv_dtype: str
    block_size: int
    target: Target
    slopes: Tensor | None
    """ALiBi's, in base 2, on the device."""
    _options: dict[tuple[Any, ...], Mapping[str, Any]] = field(default_factory=dict, repr=False)

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.spec.num_heads // self.spec.num_kv_heads

    @property
    def _kind(self) -> str:
        return kind_of(floats=self.dtype == torch.float32, coded=self.kv_dtype in CODECS)

    @cached_property
    def _sizes(self) -> dict[str, Any]:
        size = self.spec.head_size
        width = max(_LEAST_ROWS, _power(size))
        return {
            "HEADS": self.spec.num_heads,
            "KV_HEADS": self.spec.num_kv_heads,
            "KEY_SIZE": size,
            "KEY_WIDTH": width,
            "VALUE_SIZE": size,
            "VALUE_WIDTH": width,
            "BLOCK": self.block_size,
            "FORMAT": self.kv_dtype if self.kv_dtype in CODECS else "plain",
        }

    @cached_property
    def _scoring(self) -> dict[str, Any]:
        spec = self.spec
        capped = spec.soft_cap is not None
        return {
            "SCALE": spec.scale * (1.0 if capped else math.log2(math.e)),
            "CAP": spec.soft_cap or 0.0,
            "WINDOW": spec.window or 0,
            "ALIBI": spec.alibi_slopes is not None,
            "NATIVE": self.target.tuning.native_e4m3,
            "DOT": self._operand,
        }

    @property
    def _operand(self) -> Any:
        """The dtype of what is multiplied: codes are exact in float16, whatever queries are."""
        language = import_module(f"{KERNELS}.language").tl
        exact = self.dtype == torch.float32
        if exact or (self.target.interpreted and self.dtype == torch.bfloat16):
            return language.float32
        half = self._kind == "coded" or self.dtype == torch.float16
        return language.float16 if half else language.bfloat16

    def _tile(self, kernel: str) -> Tile:
        return self.target.tuning.tile(kernel, self.spec.head_size, self._kind)

    def few(self, plan: Plan) -> int:
        """Rows with so many query tokens, or fewer, go to ``decode``."""
        if plan.alone:
            return 1
        return min(max(1, self._tile("decode").rows // self.group), MOST_FEW)

    def write(
        self,
        sides: tuple[Tensor, Tensor, Tensor],
        turned: Tensor | None,
        angles: tuple[Tensor, ...],
        norms: tuple[Tensor, Tensor, float] | None,
        cache: Cache,
        plan: Plan,
    ) -> Launch:
        """Norms and rotations, if there are angles, and the KV write; ``turned`` takes queries."""
        q, k, v = sides
        tuning = self.target.tuning
        heads = min(tuning.write_heads, _power(max(self.spec.num_kv_heads, 1)))
        half = angles[0].shape[-1] if angles else 0
        parts = -(-self.spec.num_kv_heads // heads)
        parts += -(-self.spec.num_heads // heads) if half else 0
        codec = CODECS.get(self.kv_dtype)
        cos, sin = angles or (None, None)
        q_norm, k_norm, eps = norms or (None, None, 0.0)
        return Launch(
            "write",
            (plan.num_tokens, parts),
            (
                *(q, k, v, turned, cos, sin, q_norm, k_norm),
                *(cache.keys, cache.values, cache.key_scales, cache.value_scales, plan.slots),
                *(*q.stride()[:2], *k.stride()[:2], *v.stride()[:2]),
            ),
            {
                **self._sizes,
                "LARGEST": codec.largest if codec else 0.0,
                "HALF": half,
                "NORMED": norms is not None,
                "EPS": eps,
                "PART": heads,
                "num_warps": tuning.write_warps,
            },
        )

    def prefill(self, q: Tensor, out: Tensor, cache: Cache, plan: Plan) -> Launch:
        """Attend rows with many query tokens."""
        options = self._prefill_options(self.few(plan) if plan.few else 0)
        queries = options["ROWS"] // self.group
        return Launch(
            "prefill",
            (plan.num_tokens // queries + plan.num_rows + 1, self.spec.num_kv_heads),
            (q, out, *self._read(cache, plan), *q.stride()[:2], plan.num_rows),
            options,
        )

    def _prefill_options(self, few: int) -> Mapping[str, Any]:
        tile = self._tile("prefill")
        rows = max(tile.rows, _power(self.group))
        return self._kept(("prefill", few), rows, tile, {"FEW": few})

    def decode(
        self, q: Tensor, out: Tensor, partial: Tensor | None, weights: Tensor | None,
        cache: Cache, plan: Plan,
    ) -> Launch:  # fmt: skip
        """Attend rows with few query tokens; into ``partial`` and ``weights`` where in parts."""
        tile, few, split = self._tile("decode"), self.few(plan), partial is not None
        rows = max(_LEAST_ROWS, _power(self.group * few))
        more = {"FEW": few, "ALONE": plan.alone, "SPLIT": split}
        return Launch(
            "decode",
            (self.parts(plan), self.spec.num_kv_heads, plan.num_rows),
            (q, out, partial, weights, *self._read(cache, plan), *q.stride()[:2]),
            self._kept(("decode", few, plan.alone, split), rows, tile, more),
        )

    def _kept(
        self, key: tuple[Any, ...], rows: int, tile: Tile, more: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Options of an attending launch, made once: hundreds of these are launched per step."""
        known = self._options.get(key)
        if known is None:
            shape = {"ROWS": rows, "TILE": tile.keys}
            how = {"num_warps": tile.warps, "num_stages": tile.stages}
            known = {**self._sizes, **self._scoring, **shape, **more, **how}
            self._options[key] = known
        return known

    def reduce(self, out: Tensor, partial: Tensor, weights: Tensor, plan: Plan) -> Launch:
        """Merge what ``decode`` attended in parts."""
        few = self.few(plan)
        names = ("HEADS", "VALUE_SIZE", "VALUE_WIDTH")
        return Launch(
            "reduce",
            (plan.num_rows, few * self.spec.num_heads),
            (out, partial, weights, plan.starts),
            {
                **{name: self._sizes[name] for name in names},
                "FEW": few,
                "ALONE": plan.alone,
                "PARTS": self.parts(plan),
            },
        )

    def parts(self, plan: Plan) -> int:
        """Into how many parts the keys of each row are cut: enough to keep the GPU busy.

        Lengths have no say: a step is recorded once and replayed at any length.
        """
        tuning = self.target.tuning
        programs = plan.num_rows * self.spec.num_kv_heads
        wanted = -(-self.target.processors * tuning.programs // programs)
        if self.spec.window is not None:
            wanted = min(wanted, 1 + self.spec.window // self._tile("decode").keys)
        return min(_power(wanted), tuning.most_parts)

    def _read(self, cache: Cache, plan: Plan) -> tuple[Tensor | None, ...]:
        return (
            *(cache.keys, cache.values, cache.key_scales, cache.value_scales, self.slopes),
            *(plan.starts, plan.lens, plan.meta, plan.tables),
        )
