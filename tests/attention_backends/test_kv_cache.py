"""Caches of one byte per entry, through every backend that has them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dovetail.attention_backends.invariant import InvariantAttention
from dovetail.attention_backends.kv_cache import bytes_per_block, make_cache
from dovetail.attention_backends.reference import ReferenceAttention
from dovetail.attention_backends.sdpa import SdpaAttention
from tests.attention_backends.sequences import Sequences, make_need, make_spec

CPU = torch.device("cpu")
LENGTHS = (1, 17, 100, 140)
BACKENDS = [ReferenceAttention, SdpaAttention, InvariantAttention]
WORST = {"int8": 0.03, "fp8_e4m3": 0.12, "fp8_e5m2": 0.25}
"""Largest error of an attended value, for keys and values drawn from a normal distribution."""
KV_DTYPES = list(WORST)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_values_are_near_those_of_a_float32_cache(backend: Any, kv_dtype: str) -> None:
    spec = make_spec(size=64)
    exact = Sequences(spec, make_need(spec), LENGTHS)
    want = torch.cat(exact.run(ReferenceAttention(CPU), exact.whole()))
    coded = Sequences(spec, make_need(spec, kv_dtype=kv_dtype), LENGTHS)
    for steps in (coded.whole(), coded.one_by_one(), coded.mixed()):
        error = (torch.cat(coded.run(backend(CPU), steps)) - want).abs()
        assert WORST[kv_dtype] / 20 < error.max() < WORST[kv_dtype]


@pytest.mark.parametrize("kv_dtype", [*KV_DTYPES, "bfloat16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_reads_what_later_steps_will_read(backend: Any, kv_dtype: str) -> None:
    """Else pieces and cached prefixes would show in the values."""
    spec = make_spec(size=64)
    work = Sequences(spec, make_need(spec, kv_dtype=kv_dtype), LENGTHS)
    whole = torch.cat(work.run(backend(CPU), work.whole()))
    for steps in (work.one_by_one(), work.mixed()):
        assert torch.allclose(torch.cat(work.run(backend(CPU), steps)), whole, atol=3e-6)


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_deterministic_mode_has_them_too(dtype: str, kv_dtype: str) -> None:
    spec = make_spec()
    work = Sequences(spec, make_need(spec, dtype=dtype, kv_dtype=kv_dtype), LENGTHS)
    want = work.run(InvariantAttention(CPU), [[(i, 0, n)] for i, n in enumerate(LENGTHS)])
    for steps in (work.whole(), work.one_by_one(), work.mixed()):
        got = work.run(InvariantAttention(CPU), steps)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("kv_dtype", [*KV_DTYPES, "float16"])
def test_copies_take_the_scales_along(kv_dtype: str) -> None:
    spec = make_spec(size=8)
    need = make_need(spec, kv_dtype=kv_dtype, block_size=2)
    cache = make_cache(spec, need, 4, CPU)
    k, v = torch.randn(2, 2, 2, 8), torch.randn(2, 2, 2, 8)
    blocks, offsets = torch.tensor([1, 1]), torch.tensor([0, 1])
    cache.write(k[0], v[0], blocks, offsets)
    before = cache.gather(torch.tensor([1]), torch.float32)
    SdpaAttention(CPU).copy_blocks([cache], np.array([[1, 3]], np.int32))
    cache.write(k[1], v[1], blocks, offsets)
    assert torch.equal(cache.gather(torch.tensor([3]), torch.float32), before)
    assert not torch.equal(cache.gather(torch.tensor([1]), torch.float32), before)
    cache.write_one(k[0][:1], v[0][:1], 2, 1)
    one = cache.gather(torch.tensor([2]), torch.float32)
    assert torch.equal(one[:, :, 1], before[:, :, 0])
    assert (one[:, :, 0] == 0).all()


def test_scales_are_paid_for() -> None:
    spec = make_spec(kv_heads=2, size=64)
    assert bytes_per_block(spec, make_need(spec, kv_dtype="int8")) == 2 * 16 * 2 * (64 + 2)
    assert bytes_per_block(spec, make_need(spec, kv_dtype="bfloat16")) == 2 * 16 * 2 * 64 * 2


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_unknown_dtype_is_refused(backend: Any) -> None:
    need = make_need(make_spec(), kv_dtype="int4")
    assert "int4" in str(backend(CPU).refuses(need))
