"""Paged attention in bfloat16 against the readable backend, in what the kit does not try."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from cpu_kernels import threads
from dovetail_cpu.attention import NativeAttention
from dovetail_cpu.kernels import Kernels
from torch import Tensor

from dovetail.attention_backends.kv_codec import CODECS
from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.core.contracts.attention import AttentionSpec
from tests.attention_backends.sequences import Piece, Sequences, make_need, make_spec

REFERENCE = ReferenceAttention(torch.device("cpu"))
LENGTHS = (1, 5, 16, 17, 100, 255, 256, 257)
SLOPES = tuple(2.0 ** -(i + 1) for i in range(8))
NAN, INFINITY = float("nan"), float("inf")
SHAPES: dict[str, tuple[int, dict[str, Any]]] = {
    "groups of 1": (16, {"heads": 3, "kv_heads": 3, "size": 64}),
    "groups of 4": (32, {"heads": 8, "kv_heads": 2, "size": 80}),
    "groups of 7": (64, {"heads": 14, "kv_heads": 2, "size": 64}),
    "groups of 32": (128, {"heads": 32, "kv_heads": 1, "size": 128}),
    "groups of 96": (16, {"heads": 96, "kv_heads": 1, "size": 16}),
    "heads of 256": (32, {"heads": 2, "kv_heads": 1, "size": 256}),
    "window of 1": (16, {"window": 1}),
    "window of 20": (32, {"window": 20, "size": 80}),
    "window of 256": (128, {"window": 256}),
    "soft cap": (16, {"soft_cap": 2.0}),
    "window and soft cap": (64, {"window": 70, "soft_cap": 5.0, "heads": 7, "kv_heads": 1}),
    "ALiBi": (32, {"heads": 8, "kv_heads": 2, "alibi_slopes": SLOPES}),
}


def make_work(
    lengths: Sequence[int] = LENGTHS,
    block_size: int = 16,
    kv_dtype: str = "bfloat16",
    **settings: Any,
) -> Sequences:
    spec = make_spec(**settings)
    need = make_need(spec, dtype="bfloat16", kv_dtype=kv_dtype, block_size=block_size)
    return Sequences(spec, need, lengths)


def expect_near(got: Tensor, want: Tensor) -> None:
    """Weights and results are rounded to bfloat16."""
    assert torch.allclose(got.float(), want.float(), rtol=2**-6, atol=1.5e-2)


def expect_all_near(got: list[Tensor], want: list[Tensor]) -> None:
    for ours, theirs in zip(got, want, strict=True):
        expect_near(ours, theirs)


def in_pieces(lengths: Sequence[int], *ends: int) -> list[list[Piece]]:
    """Steps that take every sequence up to each of the ends in turn."""
    steps, done = [], 0
    for end in (*ends, max(lengths)):
        pieces = [(i, done, min(end, n) - done) for i, n in enumerate(lengths) if n > done]
        if pieces:
            steps.append(pieces)
        done = end
    return steps


@pytest.mark.parametrize("name", SHAPES)
def test_values_are_those_of_the_reference(name: str, kernels: Kernels) -> None:
    block_size, settings = SHAPES[name]
    work = make_work(block_size=block_size, **settings)
    want = work.run(REFERENCE, work.whole())
    backend = NativeAttention(kernels)
    paths = [
        work.whole(),
        work.mixed(),
        in_pieces(LENGTHS, 16, 48, 99),
        in_pieces(LENGTHS, *range(240, 257)),
        in_pieces(LENGTHS, 3, 250, 253),
    ]
    for num, steps in enumerate(paths):
        with threads(1 + num % 2):
            expect_all_near(work.run(backend, steps), want)


@pytest.mark.parametrize("kv_dtype", CODECS)
@pytest.mark.parametrize("name", SHAPES)
def test_values_of_codes(name: str, kv_dtype: str, kernels: Kernels) -> None:
    """The reference reads the same codes, so that what they lose is in neither's difference."""
    block_size, settings = SHAPES[name]
    work = make_work(block_size=block_size, kv_dtype=kv_dtype, **settings)
    want = work.run(REFERENCE, work.whole())
    backend = NativeAttention(kernels)
    for num, steps in enumerate([work.whole(), work.mixed(), in_pieces(LENGTHS, 3, 250, 253)]):
        with threads(1 + num % 2):
            expect_all_near(work.run(backend, steps), want)


@pytest.mark.parametrize("kv_dtype", CODECS)
def test_codes_and_scales_are_the_codecs(kv_dtype: str, kernels: Kernels) -> None:
    work = make_work((32,), 32, kv_dtype, heads=2, kv_heads=2, size=64)
    # From zero over what is subnormal in the formats to large numbers.
    work.k[0] *= torch.logspace(-7, 4, 64).bfloat16()
    work.k[0][5], work.v[0][3], work.v[0][4] = 0, 1e-38, 3e38
    backend = NativeAttention(kernels)
    cache = backend.allocate(work.spec, work.need, work.num_blocks)
    plan = backend.plan(work.batch(work.whole()[0]), work.need)
    backend.attend(work.q[0], work.k[0], work.v[0], cache, plan, work.spec)
    block = int(work.tables[0, 0])
    keys, values = cache.entries[block]  # a row of each head
    read = (
        keys.view(2, 32, 32, 2).permute(2, 0, 1, 3).flatten(2),
        values.view(2, 16, 64, 2).permute(1, 3, 0, 2).flatten(0, 1),
    )
    for side, got, scales in zip((work.k[0], work.v[0]), read, cache.scales[block], strict=True):
        codes, want = CODECS[kv_dtype].encode(side)
        assert torch.equal(scales.t(), want)
        assert torch.equal(CODECS[kv_dtype].to_numbers(got), CODECS[kv_dtype].to_numbers(codes))


@pytest.mark.parametrize("kv_dtype", ["bfloat16", *CODECS])
@pytest.mark.parametrize("name", [name for name in SHAPES if "window" not in name])
def test_a_tokens_bits_are_the_same_in_any_company(
    name: str, kv_dtype: str, kernels: Kernels
) -> None:
    """Of sequences that are not cut: alone, with others, or with more of its own.

    Up to weights of 2**-126 that AVX2 gives to what a token does not see.
    """
    block_size, settings = SHAPES[name]
    work = make_work((5, 100, 257), block_size, kv_dtype, **settings)
    backend = NativeAttention(kernels)
    want = work.run(backend, work.whole())
    one_by_one = in_pieces((5, 100, 257), 82, *range(83, 101), 238, *range(239, 257))
    for steps in (one_by_one, work.mixed()):
        for got, whole in zip(work.run(backend, steps), want, strict=True):
            assert torch.equal(got * (got.abs() > 1e-36), whole * (whole.abs() > 1e-36))


@pytest.mark.parametrize("name", ["groups of 7", "window of 20", "soft cap", "ALiBi"])
@pytest.mark.parametrize("length", [511, 512, 513, 1000, 1025])
def test_long_sequences_are_cut_and_merged(length: int, name: str, kernels: Kernels) -> None:
    block_size, settings = SHAPES[name]
    work = make_work((length, 3), block_size, **settings)
    want = work.run(REFERENCE, work.whole())
    backend = NativeAttention(kernels)
    last = [[(0, 0, length - 4), (1, 0, 2)], [(0, length - 4, 3)], [(0, length - 1, 1), (1, 2, 1)]]
    with threads(2):
        plan = backend.plan(work.batch(last[1]), work.need)
        assert (plan.step.num_merges > 0) == (length > 512)
        expect_all_near(work.run(backend, last), want)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", *CODECS])
def test_a_new_owner_does_not_see_what_an_earlier_one_left(kv_dtype: str, kernels: Kernels) -> None:
    for block_size in (16, 64):
        work = make_work((1, 17, 40), block_size, kv_dtype)
        steps = [*in_pieces((1, 17, 40), 17, 18, 19, 35)]
        backend = NativeAttention(kernels)
        want = work.run(backend, steps)
        clean = backend.allocate

        def dirty(spec: AttentionSpec, need: Any, count: int, clean: Any = clean) -> Any:
            cache = clean(spec, need, count)
            if cache.scales is None:
                cache.entries.fill_(NAN)
            else:
                cache.entries.fill_(0x7F)
                cache.scales.fill_(NAN)
            return cache

        backend.allocate = dirty  # type: ignore[method-assign]
        for ours, theirs in zip(work.run(backend, steps), want, strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", *CODECS])
@pytest.mark.parametrize(("side", "value"), [("q", NAN), ("k", NAN), ("v", NAN), ("v", INFINITY)])
def test_a_sequence_that_is_not_finite_spoils_no_other(
    side: str, value: float, kv_dtype: str, kernels: Kernels
) -> None:
    work = make_work((5, 20, 40), kv_dtype=kv_dtype)
    backend = NativeAttention(kernels)
    plain = work.run(backend, work.mixed())
    getattr(work, side)[1].fill_(value)
    got = work.run(backend, work.mixed())
    assert not got[1].isfinite().any()
    assert torch.equal(got[0], plain[0])
    assert torch.equal(got[2], plain[2])


def test_what_is_not_a_number_outlives_a_merge(kernels: Kernels) -> None:
    work = make_work((1000,))
    work.q[0][999] = NAN
    with threads(2):
        got = work.run(NativeAttention(kernels), [[(0, 0, 999)], [(0, 999, 1)]])
    assert got[0][:999].isfinite().all()
    assert got[0][999].isnan().all()


def test_large_scores_stay_finite(kernels: Kernels) -> None:
    work = make_work((40, 300), size=64)
    work.q = [100 * q for q in work.q]
    want = work.run(REFERENCE, work.whole())
    got = work.run(NativeAttention(kernels), work.whole())
    for ours, theirs in zip(got, want, strict=True):
        assert ours.isfinite().all()
        # Where two scores of a thousand are near each other, their rounding decides.
        assert (ours.float() - theirs.float()).abs().mean() < 0.02


def composed(work: Sequences, angles: tuple[Tensor, ...], norms: Any) -> Tensor:
    """``rotary_attention`` as it is derived from the other ops, in float32."""
    sides = [torch.cat(side).float() for side in (work.q, work.k)]
    if norms is not None:
        weights, eps = norms[:2], norms[2]
        sides = [
            side * (side.pow(2).mean(-1, keepdim=True) + eps).rsqrt() * weight.float()
            for side, weight in zip(sides, weights, strict=True)
        ]
    half = angles[0].shape[1]
    cosine, sine = (angle[:, None] for angle in angles)
    for side in sides:
        low, high = side[..., :half].clone(), side[..., half : 2 * half].clone()
        side[..., :half] = low * cosine - high * sine
        side[..., half : 2 * half] = high * cosine + low * sine
    cache = REFERENCE.allocate(work.spec, work.need, work.num_blocks)
    plan = REFERENCE.plan(work.batch(work.whole()[0]), work.need)
    q, k = (side.bfloat16() for side in sides)
    out, _ = REFERENCE.attend(q, k, torch.cat(work.v), cache, plan, work.spec)
    return out


@pytest.mark.parametrize("half", [1, 8, 16, 20, 40])
@pytest.mark.parametrize("weights", [None, torch.bfloat16, torch.float32])
def test_norms_and_rotation_on_the_way(
    weights: torch.dtype | None, half: int, kernels: Kernels
) -> None:
    work = make_work((3, 20, 60), heads=6, kv_heads=2, size=80)
    phase = torch.rand(83, half, generator=torch.Generator().manual_seed(1)) * 6
    angles = (phase.cos(), phase.sin())
    norms = None
    if weights is not None:
        ramps = (torch.linspace(0.5, 2, 80), torch.linspace(1, -1, 80))
        norms = (*(ramp.to(weights) for ramp in ramps), 1e-5)
    backend = NativeAttention(kernels)
    cache = backend.allocate(work.spec, work.need, work.num_blocks)
    plan = backend.plan(work.batch(work.whole()[0]), work.need)
    sides = [torch.cat(side) for side in (work.q, work.k, work.v)]
    fused = torch.cat([side.flatten(1) for side in sides], 1)
    parts = fused.split([side[0].numel() for side in sides], 1)
    views = [part.unflatten(1, (-1, 80)) for part in parts]
    before = fused.clone()
    got, _ = backend.rotary_attend(*views, angles, norms, cache, plan, work.spec)
    assert torch.equal(fused, before)
    assert torch.allclose(got.float(), composed(work, angles, norms).float(), atol=4e-2)


@pytest.mark.parametrize("kv_dtype", ["bfloat16", "int8"])
def test_copied_blocks_are_copies(kv_dtype: str, kernels: Kernels) -> None:
    backend = NativeAttention(kernels)
    work = make_work((40,), kv_dtype=kv_dtype)
    cache = backend.allocate(work.spec, work.need, 6)
    parts = [part for part in (cache.entries, cache.scales) if part is not None]
    assert sum(part[0].nbytes for part in parts) == backend.bytes_per_block(work.spec, work.need)
    for part in parts:
        part.copy_(100 * torch.rand(part.shape))
    before = [part.clone() for part in parts]
    (same,) = backend.copy_blocks([cache], np.array([[1, 4], [2, 5]], np.int32))
    assert same is cache
    for part, old in zip(parts, before, strict=True):
        assert torch.equal(part[[4, 5]], old[[1, 2]])
        part[1] = 0
        assert torch.equal(part[4], old[1])
        assert torch.equal(part[[0, 2, 3]], old[[0, 2, 3]])


@pytest.mark.parametrize(
    ("settings", "need", "reason"),
    [
        ({}, {"deterministic": True}, "number of rows"),
        ({}, {"dtype": "float32"}, "computes in bfloat16, not float32"),
        ({}, {"kv_dtype": "float16"}, "keeps bfloat16, int8, fp8_e4m3, fp8_e5m2, not float16"),
        ({}, {"block_size": 8}, "multiple of 16 positions, not 8"),
        ({"size": 40}, {}, "not 40"),
        ({"size": 272}, {}, "entries up to 256, not 272"),
        ({"heads": 97, "kv_heads": 1}, {}, "up to 96 query heads share a KV head, not 97"),
        ({"heads": 194, "kv_heads": 2}, {}, "up to 96 query heads share a KV head, not 97"),
    ],
)
def test_refusals_say_why(
    settings: dict[str, Any], need: dict[str, Any], reason: str, kernels: Kernels
) -> None:
    fixed = {"dtype": "bfloat16", "kv_dtype": "bfloat16"}
    refusal = NativeAttention(kernels).refuses(make_need(make_spec(**settings), **(fixed | need)))
    assert refusal is not None
    assert reason in refusal


def test_a_plan_of_another_backend_is_an_error(kernels: Kernels) -> None:
    backend, work = NativeAttention(kernels), make_work((4,))
    cache = backend.allocate(work.spec, work.need, work.num_blocks)
    with pytest.raises(TypeError, match="another backend"):
        backend.attend(work.q[0], work.k[0], work.v[0], cache, object(), work.spec)
