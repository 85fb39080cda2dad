"""Sequences of random queries, keys and values, taken through a backend in any pieces."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import Batch, SamplingBatch
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec

NO_SAMPLING = SamplingBatch.greedy(0)
Piece = tuple[int, int, int]
"""(sequence, first position, number of positions) that a step computes."""


def make_spec(heads: int = 4, kv_heads: int = 2, size: int = 16, **more: Any) -> AttentionSpec:
    return AttentionSpec(
        layer=0, num_heads=heads, num_kv_heads=kv_heads, head_size=size, scale=size**-0.5, **more
    )


def make_need(spec: AttentionSpec, **more: Any) -> AttentionNeed:
    fixed = {"dtype": "float32", "kv_dtype": "float32", "block_size": 16}
    return AttentionNeed(specs=(spec,), **(fixed | more))


@dataclass
class Sequences:
    """Blocks of sequence i are scattered, and lie between those of the others."""

    spec: AttentionSpec
    need: AttentionNeed
    lengths: Sequence[int]
    spread: float = 1.0

    def __post_init__(self) -> None:
        random = torch.Generator().manual_seed(0)
        spec, dtype = self.spec, getattr(torch, self.need.dtype)

        def draw(length: int, heads: int) -> Tensor:
            values = torch.randn(length, heads, spec.head_size, generator=random)
            return (self.spread * values).to(dtype)

        self.q = [draw(n, spec.num_heads) for n in self.lengths]
        self.k = [draw(n, spec.num_kv_heads) for n in self.lengths]
        self.v = [draw(n, spec.num_kv_heads) for n in self.lengths]
        self.width = -(-max(self.lengths) // self.need.block_size)
        numbers = np.random.default_rng(0).permutation(len(self.lengths) * self.width) + 1
        self.tables = numbers.reshape(len(self.lengths), self.width).astype(np.int32)
        self.num_blocks = numbers.size + 1

    def run(self, backend: Any, steps: Sequence[Sequence[Piece]]) -> list[Tensor]:
        """What every position got, (L, H, E) for each sequence."""
        cache = backend.allocate(self.spec, self.need, self.num_blocks)
        out = [torch.full_like(q, float("nan")) for q in self.q]
        for pieces in steps:
            plan = backend.plan(self.batch(pieces), self.need)
            q, k, v = (
                torch.cat([side[i][a : a + n] for i, a, n in pieces])
                for side in (self.q, self.k, self.v)
            )
            with torch.inference_mode():
                got, cache = backend.attend(q, k, v, cache, plan, self.spec)
            for (i, a, n), part in zip(pieces, got.split([n for *_, n in pieces]), strict=True):
                out[i][a : a + n] = part
        return out

    def batch(self, pieces: Sequence[Piece]) -> Batch:
        rows = np.array([i for i, *_ in pieces], np.int32)
        none = np.zeros(0, np.int32)
        ends = max(a + n for _, a, n in pieces)
        return Batch(
            step=0,
            rows=rows,
            query_lens=np.array([n for *_, n in pieces], np.int32),
            context_lens=np.array([a for _, a, _ in pieces], np.int32),
            block_tables=self.tables[rows, : -(-ends // self.need.block_size)],
            token_ids=np.zeros(sum(n for *_, n in pieces), np.int32),
            carried=none,
            carried_rows=none,
            sampled=none,
            sampling=NO_SAMPLING,
            copies=np.zeros((0, 2), np.int32),
        )

    def whole(self) -> list[list[Piece]]:
        """Each sequence in one piece, all in one step."""
        return [[(i, 0, n) for i, n in enumerate(self.lengths)]]

    def one_by_one(self) -> list[list[Piece]]:
        """A token of every sequence that has one left, in each step."""
        return [
            [(i, position, 1) for i, n in enumerate(self.lengths) if position < n]
            for position in range(max(self.lengths))
        ]

    def mixed(self) -> list[list[Piece]]:
        """Pieces of different lengths, so that rows that decode stand beside rows that do not."""
        done, steps, rng = [0] * len(self.lengths), [], np.random.default_rng(1)
        while any(a < n for a, n in zip(done, self.lengths, strict=True)):
            pieces = []
            for i in rng.permutation(len(done)).tolist():
                count = min(int(rng.choice([1, 1, 1, 2, 7, 33])), self.lengths[i] - done[i])
                if count and rng.random() < 0.8:
                    pieces.append((i, done[i], count))
                    done[i] += count
            if pieces:
                steps.append(pieces)
        return steps
