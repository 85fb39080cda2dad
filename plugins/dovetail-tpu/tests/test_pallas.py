"""The Pallas kernels, interpreted, against dense attention in plain numpy; and lowered for TPU."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from dovetail_tpu.pallas import PallasAttention
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from dovetail.core.batch import Batch, SamplingBatch
from dovetail.core.buckets import Buckets
from dovetail.core.contracts.attention import AttentionNeed, AttentionSpec
from dovetail.core.errors import UnsupportedError
from tests.thorough import every

TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
"""Largest difference, for values of about 1: sums in another order, and weights in 8 bits."""
BACKEND = PallasAttention(interpret=True)
Piece = tuple[int, int, int]
"""(sequence, first position, number of positions) that a step computes."""


def make_spec(heads: int = 4, kv_heads: int = 2, size: int = 16, **more: Any) -> AttentionSpec:
    fixed = {"layer": 0, "scale": size**-0.5}
    return AttentionSpec(num_heads=heads, num_kv_heads=kv_heads, head_size=size, **(fixed | more))


def make_need(*specs: AttentionSpec, **more: Any) -> AttentionNeed:
    dtype = more.pop("dtype", "float32")
    fixed = {"dtype": dtype, "kv_dtype": dtype, "block_size": 16}
    return AttentionNeed(specs=specs, **(fixed | more))


@functools.cache
def compiled(spec: AttentionSpec) -> Any:
    attend = functools.partial(BACKEND.attend, spec=spec)
    return jax.jit(attend, donate_argnums=3, compiler_options={"xla_backend_optimization_level": 0})


def dense(q_LHE: Any, k_LKE: Any, v_LKE: Any, spec: AttentionSpec) -> Any:
    """Causal attention of one whole sequence, float64."""
    q_LHE, k_LKE, v_LKE = (x.astype(np.float64) for x in (q_LHE, k_LKE, v_LKE))
    group = spec.num_heads // spec.num_kv_heads
    k_LHE, v_LHE = k_LKE.repeat(group, 1), v_LKE.repeat(group, 1)
    scores = np.einsum("qhe,khe->hqk", q_LHE, k_LHE) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    at = np.arange(len(q_LHE))
    distance = at[:, None] - at
    scores[:, (distance < 0) | (distance >= (spec.window or len(at)))] = -np.inf
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hqk,khe->qhe", weights / weights.sum(-1, keepdims=True), v_LHE)


@dataclass
class Sequences:
    """Random sequences; their blocks are scattered, and all that is not theirs holds NaN."""

    spec: AttentionSpec
    need: AttentionNeed
    lengths: Sequence[int]
    buckets: Buckets | None = None

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        dtype = jnp.dtype(self.need.dtype)
        heads = (self.spec.num_heads, self.spec.num_kv_heads, self.spec.num_kv_heads)
        self.qkv = [
            [rng.standard_normal((n, h, self.spec.head_size)).astype(dtype) for h in heads]
            for n in self.lengths
        ]
        self.width = -(-max(self.lengths) // self.need.block_size)
        numbers = rng.permutation(2 * len(self.lengths) * self.width)[
            : len(self.lengths) * self.width
        ]
        self.tables = (numbers + 1).reshape(len(self.lengths), -1).astype(np.int32)
        self.num_blocks = 2 * numbers.size + 1

    def batch(self, pieces: Sequence[Piece]) -> Batch:
        rows = np.array([i for i, *_ in pieces])
        none = np.zeros(0, np.int32)
        ends = np.array([a + n for _, a, n in pieces])
        num_blocks = -(-ends // self.need.block_size)
        tables = self.tables[rows, : num_blocks.max()]
        if self.need.window is not None:
            seen = np.array([a for _, a, _ in pieces]) - self.need.window + 1
            dropped = np.arange(tables.shape[1]) < (seen // self.need.block_size)[:, None]
            tables = np.where(dropped, 0, tables)
        tables = np.where(np.arange(tables.shape[1]) < num_blocks[:, None], tables, 0)
        batch = Batch(
            step=0, rows=rows, block_tables=tables.astype(np.int32),
            query_lens=np.array([n for *_, n in pieces], np.int32),
            context_lens=np.array([a for _, a, _ in pieces], np.int32),
            token_ids=np.zeros(sum(n for *_, n in pieces), np.int32),
            carried=none, carried_rows=none, sampled=none, sampling=SamplingBatch.greedy(0),
            copies=np.zeros((0, 2), np.int32),
        )  # fmt: skip
        return self.buckets.pad(batch) if self.buckets else batch

    def run(self, steps: Sequence[Sequence[Piece]]) -> list[Any]:
        """What every position got, (L, H, E) for each sequence."""
        cache = jnp.full_like(BACKEND.allocate(self.spec, self.need, self.num_blocks), jnp.nan)
        out = [np.full(q.shape, np.nan) for q, _, _ in self.qkv]
        for pieces in steps:
            batch = self.batch(pieces)
            plan = BACKEND.plan(batch, self.need)
            inputs = [
                np.concatenate([self.qkv[i][s][a : a + n] for i, a, n in pieces]) for s in range(3)
            ]
            q, k, v = (
                np.pad(x, ((0, batch.num_padding), (0, 0), (0, 0)), constant_values=np.nan)
                for x in inputs
            )
            got, cache = compiled(self.spec)(q, k, v, cache, plan)
            assert got.shape == q.shape and got.dtype == q.dtype
            got = np.asarray(got, np.float64)
            void = len(got) - batch.num_padding
            assert not got[void:].any()
            for i, a, n in pieces:
                out[i][a : a + n], got = got[:n], got[n:]
        return out

    def check(self, steps: Sequence[Sequence[Piece]]) -> None:
        for (q, k, v), got in zip(self.qkv, self.run(steps), strict=True):
            np.testing.assert_allclose(
                got, dense(q, k, v, self.spec), atol=TOLERANCE[self.need.dtype], rtol=0
            )

    def whole(self) -> list[list[Piece]]:
        return [[(i, 0, n) for i, n in enumerate(self.lengths)]]

    def one_by_one(self) -> list[list[Piece]]:
        return [
            [(i, position, 1) for i, n in enumerate(self.lengths) if position < n]
            for position in range(max(self.lengths))
        ]

    def mixed(self) -> list[list[Piece]]:
        """Pieces of different lengths, rows that decode among rows that do not, in any order."""
        done, steps, rng = [0] * len(self.lengths), [], np.random.default_rng(1)
        while any(a < n for a, n in zip(done, self.lengths, strict=True)):
            pieces = []
            for i in rng.permutation(len(done)).tolist():
                count = min(int(rng.choice([1, 1, 2, 7, 33])), self.lengths[i] - done[i])
                if count and rng.random() < 0.8:
                    pieces.append((i, done[i], count))
                    done[i] += count
            if pieces:
                steps.append(pieces)
        return steps


WHOLE, BY_ONE, MIXED = Sequences.whole, Sequences.one_by_one, Sequences.mixed
FINE = Buckets(decode=(2, 4), tokens=(16, 128), blocks=(4, 8))
COARSE = Buckets(decode=(4,), tokens=(128,), blocks=(8,))
LENGTHS = (1, 47, 16, 40)
CASES = {
    "group 1, head 64": (make_spec(2, 2, 64), {"block_size": 32}),
    "group 3, window within a block": (make_spec(6, 2, 64, window=5), {"block_size": 16}),
    "group 4, window over blocks": (make_spec(4, 1, 16, window=20), {"block_size": 8}),
    "group 8, head 80, soft cap": (make_spec(8, 1, 80, soft_cap=1.5), {"block_size": 16}),
    "head 128, block 64": (make_spec(2, 1, 128), {"block_size": 64}),
    "bfloat16, head 64": (make_spec(4, 2, 64), {"dtype": "bfloat16"}),
    "bfloat16, head 128": (
        make_spec(4, 2, 128, window=30, soft_cap=2.0),
        {"dtype": "bfloat16", "block_size": 32},
    ),
}


@pytest.mark.parametrize("pieces", [WHOLE, BY_ONE, MIXED], ids=["whole", "by one", "mixed"])
def test_any_way_to_cut_sequences_gives_dense_attention(pieces: Any) -> None:
    spec = make_spec()
    sequences = Sequences(spec, make_need(spec, block_size=8), LENGTHS, FINE)
    sequences.check(pieces(sequences))


@pytest.mark.parametrize("case", every(2, CASES))
def test_shapes_and_features_give_dense_attention(case: str) -> None:
    spec, more = CASES[case]
    sequences = Sequences(spec, make_need(spec, **more), LENGTHS, COARSE)
    sequences.check(sequences.mixed())


def test_nothing_races_or_reads_what_nobody_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a TPU does it: copies that overlap with products, and memory that holds NaN at first."""
    parameters = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    careful = PallasAttention(parameters)
    monkeypatch.setattr(BACKEND, "attend", careful.attend)
    spec = make_spec(4, 2, 16, window=20, layer=1)
    sequences = Sequences(spec, make_need(spec, block_size=8), (1, 47, 16), COARSE)
    sequences.check(sequences.mixed())
    assert not interpret_pallas_call.races.races_found


def test_a_sequence_longer_than_tiles_of_keys_and_queries() -> None:
    """And unpadded, eagerly, where the caller counts in 64 bits."""
    spec = make_spec(2, 1, 16)
    sequences = Sequences(spec, make_need(spec, block_size=64), (300, 3))
    with jax.enable_x64(True):
        sequences.check([[(1, 0, 2), (0, 0, 290)], [(0, 290, 9), (1, 2, 1)], [(0, 299, 1)]])


def test_layers_with_different_windows_share_a_plan() -> None:
    wide, narrow = make_spec(), make_spec(window=7)
    sequences = Sequences(wide, make_need(wide, narrow, block_size=8), LENGTHS, COARSE)
    sequences.check(sequences.whole())
    sequences.spec = narrow
    sequences.check(sequences.whole())


def test_a_broken_sequence_breaks_no_other() -> None:
    spec = make_spec()
    sequences = Sequences(spec, make_need(spec, block_size=8), LENGTHS, COARSE)
    sequences.qkv[2] = [np.full_like(x, np.nan) for x in sequences.qkv[2]]
    out = sequences.run([[(0, 0, 1), (1, 0, 30), (2, 0, 9), (3, 0, 20)], [(1, 30, 2), (2, 9, 1)]])
    assert np.isnan(out[2][:10]).all()
    for i, length in ((0, 1), (1, 32), (3, 20)):
        whole = dense(*(x[:length] for x in sequences.qkv[i]), spec)
        np.testing.assert_allclose(out[i][:length], whole, atol=TOLERANCE["float32"])


@pytest.mark.parametrize("num_tokens", [4, 128], ids=["decode", "prefill"])
def test_a_step_of_padding_gives_zeros(num_tokens: int) -> None:
    spec = make_spec()
    sequences = Sequences(spec, make_need(spec, block_size=8), LENGTHS)
    step = sequences.batch([(0, 0, 1)])
    empty = replace(
        step,
        rows=np.zeros(4, np.int64),
        query_lens=np.zeros(4, np.int32),
        context_lens=np.zeros(4, np.int32),
        block_tables=np.zeros((4, 8), np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
        num_padding=num_tokens,
    )
    cache = BACKEND.allocate(spec, sequences.need, sequences.num_blocks) + 1
    q, kv = (np.full((num_tokens, heads, 16), np.nan, np.float32) for heads in (4, 2))
    out, after = compiled(spec)(q, kv, kv, cache, BACKEND.plan(empty, sequences.need))
    assert not np.asarray(out).any()
    assert (np.asarray(after[1:]) == 1).all()


def test_devices_may_share_the_heads() -> None:
    spec, half = make_spec(8, 2, 16), make_spec(4, 1, 16)
    need = make_need(spec)
    sequences = Sequences(spec, need, (20,))
    plan = BACKEND.plan(sequences.batch([(0, 0, 20)]), need)
    q, k, v = sequences.qkv[0]
    cache = BACKEND.allocate(spec, need, sequences.num_blocks)
    parts = [np.split(np.asarray(x), 2, 1) for x in (q, k, v)]
    caches = np.split(np.asarray(cache), 2, BACKEND.heads_axis)
    out, after = compiled(spec)(q, k, v, cache, plan)
    shares = [
        compiled(half)(*(part[i] for part in parts), jnp.asarray(caches[i]), plan) for i in (0, 1)
    ]
    np.testing.assert_array_equal(np.concatenate([share for share, _ in shares], 1), out)
    both = np.concatenate([share for _, share in shares], BACKEND.heads_axis)
    np.testing.assert_array_equal(both, after)


def test_the_cache_is_changed_in_place_and_holds_the_bytes_that_were_promised() -> None:
    spec = make_spec(4, 2, 80)
    need = make_need(spec)
    sequences = Sequences(spec, need, (20,))
    cache = BACKEND.allocate(spec, need, sequences.num_blocks)
    assert cache.nbytes == sequences.num_blocks * BACKEND.bytes_per_block(spec, need)
    plan = BACKEND.plan(sequences.batch([(0, 0, 20)]), need)
    program = compiled(spec).lower(*sequences.qkv[0], cache, plan).compile()
    assert program.memory_analysis().alias_size_in_bytes == cache.nbytes
    compiled(spec)(*sequences.qkv[0], cache, plan)
    assert cache.is_deleted()


def test_small_heads_share_lanes() -> None:
    small, large = make_spec(4, 2, 64), make_spec(4, 2, 128)
    need = make_need(small, large)
    assert BACKEND.bytes_per_block(large, need) == 2 * BACKEND.bytes_per_block(small, need)
    assert BACKEND.bytes_per_block(small, need) == 2 * 2 * 64 * 4 * need.block_size


def test_whole_blocks_are_copied() -> None:
    caches = [jnp.arange(5 * 8.0).reshape(5, 1, 8, 1) * factor for factor in (1, 2)]
    pairs = np.array([(3, 1), (4, 2), (0, 0)], np.int32)
    for before, after in zip(caches, BACKEND.copy_blocks(caches, pairs), strict=True):
        np.testing.assert_array_equal(after, before[np.array([0, 3, 4, 3, 4])])


REFUSED = [
    ({}, {"dtype": "float16"}, "float16"),
    ({}, {"kv_dtype": "int8"}, "not int8"),
    ({}, {"deterministic": True}, "cut into steps"),
    ({"alibi_slopes": (0.5,) * 4}, {}, "ALiBi"),
    ({}, {"block_size": 12}, "a multiple of 8, not 12"),
    ({}, {"block_size": 8, "dtype": "bfloat16"}, "a multiple of 16, not 8"),
    ({"size": 256, "kv_heads": 64, "heads": 64}, {"block_size": 64}, "take smaller ones"),
]


@pytest.mark.parametrize(("of_spec", "of_need", "reason"), REFUSED, ids=[r for *_, r in REFUSED])
def test_what_it_cannot_do_is_refused_with_the_reason(
    of_spec: Any, of_need: Any, reason: str
) -> None:
    assert reason in str(BACKEND.refuses(make_need(make_spec(**of_spec), **of_need)))


@pytest.mark.parametrize("size", [16, 64, 80, 128, 256])
def test_any_head_size_is_served(size: int) -> None:
    assert BACKEND.refuses(make_need(make_spec(size=size))) is None


def step(num_tokens: int, num_rows: int, num_blocks: int) -> Batch:
    """Rows of one token, and tokens that are all of the last one."""
    spec = make_spec()
    query_lens = np.ones(num_rows, np.int32)
    query_lens[-1] += num_tokens - num_rows
    return replace(
        Sequences(spec, make_need(spec), (1,)).batch([(0, 0, 1)]),
        rows=np.arange(num_rows),
        query_lens=query_lens,
        context_lens=np.full(num_rows, 16, np.int32),
        block_tables=np.zeros((num_rows, num_blocks), np.int32),
        token_ids=np.zeros(num_tokens, np.int32),
    )


def test_too_many_blocks_for_scalar_memory_are_an_error_that_says_what_to_lower() -> None:
    with pytest.raises(UnsupportedError, match="--block-size, or lower --max-model-len"):
        BACKEND.plan(step(256, 256, 1024), make_need(make_spec()))


LOWERED = {
    "llama 3 8B": (make_spec(32, 8, 128), {"block_size": 64}),
    "one KV head": (make_spec(8, 1, 128), {"block_size": 16}),
    "small heads": (make_spec(32, 8, 64), {"block_size": 128}),
    "head 80": (make_spec(32, 32, 80), {"block_size": 16}),
    "gemma 2 9B": (make_spec(16, 8, 256, window=4096, soft_cap=50.0), {"block_size": 32}),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("num_tokens", [32, 256], ids=["decode", "prefill"])
@pytest.mark.parametrize("case", LOWERED)
def test_the_kernels_are_lowered_for_tpu(case: str, num_tokens: int, dtype: str) -> None:
    """What is no whole tile, or cannot be said to the TPU's compiler, fails here."""
    spec, more = LOWERED[case]
    need = make_need(spec, dtype=dtype, **more)
    backend = PallasAttention(interpret=False)
    plan = backend.plan(step(num_tokens, 32, 512 // need.block_size), need)
    q, k = (
        jax.ShapeDtypeStruct((num_tokens, heads, spec.head_size), dtype)
        for heads in (spec.num_heads, spec.num_kv_heads)
    )
    cache = jax.eval_shape(lambda: backend.allocate(spec, need, 64))
    attend = jax.jit(functools.partial(backend.attend, spec=spec), donate_argnums=3)
    lowered = jax.export.export(attend, platforms=["tpu"])(q, k, k, cache, plan).mlir_module()
    assert lowered.count("@tpu_custom_call") == (2 if num_tokens == 32 else 3)
