"""Norms, gates and the embedding, against the plain ops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_kernels import random_tensor, threads
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.memory import HugePages
from dovetail_cpu.ops import override_ops
from torch import Tensor

from dovetail.core.contracts.ops import OpTable
from dovetail.platforms.torch.ops import references

WIDTHS = (1, 15, 16, 17, 31, 896)
NAN, INFINITY = float("nan"), float("inf")


@pytest.fixture
def ops(kernels: Kernels, memory: HugePages) -> Any:
    table = OpTable(references())
    override_ops(table, kernels, memory, "these tests")
    return table.bind()


@pytest.fixture
def plain() -> Any:
    return OpTable(references()).bind()


def expect_near(got: Tensor, want: Tensor, steps: float = 1) -> None:
    """Within so many steps of the dtype."""
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    rtol = steps * torch.finfo(want.dtype).eps
    near = torch.allclose(got.float(), want.float(), rtol=rtol, atol=1e-30, equal_nan=True)
    assert near, (got, want)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_norms(width: int, kind: torch.dtype, ops: Any, plain: Any) -> None:
    weight = random_tensor(width, dtype=kind)
    for count in (1, 7, 100):
        x, residual = random_tensor(count, width, seed=1), random_tensor(count, width, seed=2)
        x[0] *= 1e-4
        normed = plain.rms_norm(x, weight, 1e-6)
        want, same = plain.add_rms_norm(x, residual, weight, 1e-5)
        for num in (1, 2):
            with threads(num):
                own = ops.rms_norm(x, weight, 1e-6)
                got, total = ops.add_rms_norm(x, residual, weight, 1e-5)
            expect_near(own, normed, 2)
            assert torch.equal(total, same)
            expect_near(got, want, 2)


def test_norms_of_other_layouts_and_dtypes(ops: Any, plain: Any) -> None:
    weight = random_tensor(24)
    apart = random_tensor(5, 30)[:, 3:27]
    expect_near(ops.rms_norm(apart, weight, 1e-6), plain.rms_norm(apart, weight, 1e-6), 2)
    deep = random_tensor(5, 4, 24)
    expect_near(ops.rms_norm(deep, weight, 1e-6), plain.rms_norm(deep, weight, 1e-6), 2)
    for dtype in (torch.float32, torch.float16):
        other, own = deep.to(dtype), weight.to(dtype)
        assert torch.equal(ops.rms_norm(other, own, 1e-6), plain.rms_norm(other, own, 1e-6))
    assert ops.rms_norm(deep[:0], weight, 1e-6).shape == (0, 4, 24)


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width", WIDTHS)
def test_layer_norm(width: int, kind: torch.dtype, ops: Any, plain: Any) -> None:
    weight, bias = random_tensor(width, dtype=kind), random_tensor(width, dtype=kind, seed=3)
    for count in (1, 7, 100):
        x = random_tensor(count, width, seed=1) + 3
        x[0] *= 1e-3
        for own in (bias, None):
            wide = None if own is None else own.bfloat16().float()
            exact = plain.layer_norm(x.float(), weight.bfloat16().float(), wide, 1e-5)
            for num in (1, 2):
                with threads(num):
                    got = ops.layer_norm(x, weight, own, 1e-5)
                assert got.dtype is torch.bfloat16
                # Where weight and bias take each other away, the errors of float32 are left.
                assert torch.allclose(got.float(), exact, rtol=2**-8, atol=1e-4)


def test_layer_norm_of_other_layouts_and_dtypes(ops: Any, plain: Any) -> None:
    weight, bias = random_tensor(24), random_tensor(24, seed=1)
    apart, deep = random_tensor(5, 30)[:, 3:27], random_tensor(5, 4, 24)
    for x in (apart, deep):
        same = ops.layer_norm(x.contiguous(), weight, bias, 1e-5)
        assert torch.equal(ops.layer_norm(x, weight, bias, 1e-5), same)
    mixed = (weight, bias.float())
    assert torch.equal(ops.layer_norm(deep, *mixed, 1e-5), plain.layer_norm(deep, *mixed, 1e-5))
    wide = deep.float()
    assert torch.equal(
        ops.layer_norm(wide, weight, bias, 1e-5), plain.layer_norm(wide, weight, bias, 1e-5)
    )
    assert ops.layer_norm(deep[:0], weight, bias, 1e-5).shape == (0, 4, 24)


EVERY = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
"""Every number of the dtype, and what is none."""
POINTWISE: dict[str, tuple[float, ...]] = {
    "relu": (),
    "scale": (45.2548,),
    "soft_cap": (30.0,),
    "silu": (),
    "gelu": (),
    "gelu_tanh": (),
}


@pytest.mark.parametrize("name", POINTWISE)
def test_functions_of_every_number(name: str, ops: Any, plain: Any) -> None:
    """Up to where silu, which takes 2**-126 for what is less, is off by 1e-4.

    What the instruction for rounding to bf16 makes of results below 2**-126 is 0.
    """
    x, parameter = EVERY[~(EVERY.abs() > 1e33)], POINTWISE[name]
    got = getattr(ops, name)(x, *parameter)
    if name == "scale":
        exact = plain.scale(x, *parameter).nan_to_num(7)
        is_normal = exact.abs() >= torch.finfo(exact.dtype).tiny
        assert torch.equal(got.nan_to_num(7)[is_normal], exact[is_normal])
        assert (got[~is_normal].abs() <= exact[~is_normal].abs()).all()
        return
    exact = getattr(plain, name)(x.double(), *parameter)
    assert got.dtype is torch.bfloat16
    assert torch.allclose(got.double(), exact, rtol=2**-8, atol=1e-4, equal_nan=True)
    infinity = torch.tensor([INFINITY], dtype=torch.bfloat16)
    assert getattr(ops, name)(infinity, *parameter) == getattr(plain, name)(infinity, *parameter)


@pytest.mark.parametrize("name", POINTWISE)
def test_functions_of_other_sizes_and_dtypes(name: str, ops: Any, plain: Any) -> None:
    ours, theirs = getattr(ops, name), getattr(plain, name)
    parameter = POINTWISE[name]
    whole = random_tensor(70, 1024)
    want = ours(whole, *parameter)
    for count in (0, 1, 7, 17, 1023, 1024, 1025, 5000):
        for num in (1, 2):
            with threads(num):
                got = ours(whole.view(-1)[:count], *parameter)
            assert torch.equal(got, want.view(-1)[:count])
    assert torch.equal(ours(whole[:, 3:20], *parameter), want[:, 3:20])
    for dtype in (torch.float32, torch.float16):
        other = whole[:2].to(dtype)
        assert torch.equal(ours(other, *parameter), theirs(other, *parameter))


@pytest.mark.parametrize("count", [0, 1, 15, 17, 1025, 70000])
def test_add(count: int, ops: Any) -> None:
    x, y = random_tensor(count), random_tensor(count, seed=1)
    for num in (1, 2):
        with threads(num):
            assert torch.equal(ops.add(x, y), x + y)
    deep, other = random_tensor(5, 30)[:, 3:27], random_tensor(5, 24)
    assert torch.equal(ops.add(deep, other), deep + other)
    assert torch.equal(ops.add(deep.float(), other.float()), deep.float() + other.float())
    assert ops.add(deep, other.float()).dtype is torch.float32
    assert torch.equal(ops.add(deep, other[:1]), deep + other[:1])


def test_rows_do_not_meet(ops: Any) -> None:
    x, weight = random_tensor(6, 48), random_tensor(48)
    before, gated = ops.rms_norm(x, weight, 1e-6), ops.silu_and_mul(x)
    x[2, 5] = NAN
    after = ops.rms_norm(x, weight, 1e-6)
    assert after[2].isnan().all()
    others = torch.arange(6) != 2
    assert torch.equal(after[others], before[others])
    again = ops.silu_and_mul(x)
    assert again[2, 5].isnan()
    assert torch.equal(again[others], gated[others])
    assert again[2].isnan().sum() == 1


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize("width", WIDTHS)
def test_gates(width: int, name: str, ops: Any, plain: Any) -> None:
    for spread in (1.0, 20.0):
        x = (spread * random_tensor(50, 2 * width).float()).bfloat16()
        for count in (1, 3, 50):
            for num in (1, 2):
                with threads(num):
                    got = getattr(ops, name)(x[:count])
                want = getattr(plain, name)(x[:count])
                assert got.dtype is torch.bfloat16
                assert torch.allclose(got.float(), want.float(), rtol=2**-6, atol=1e-5 * spread)


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
def test_gates_of_every_number(name: str, ops: Any, plain: Any) -> None:
    """Up to where silu, which takes 2**-126 for what is less, is off by 1e-4.

    What the instruction for rounding to bf16 makes of results below 2**-126 is 0.
    """
    finite = EVERY[EVERY.abs() < 1e33].reshape(-1, 1)
    x = torch.cat([finite, torch.ones_like(finite)], 1)
    got, want = getattr(ops, name)(x).float(), getattr(plain, name)(x).float()
    assert torch.allclose(got, want, rtol=2**-6, atol=1e-4)
    assert not got.isnan().any()
    wrong = EVERY[EVERY.isnan()].reshape(-1, 1)
    assert getattr(ops, name)(torch.cat([wrong, torch.ones_like(wrong)], 1)).isnan().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_embedding(dtype: torch.dtype, ops: Any) -> None:
    table = random_tensor(10, 17, dtype=dtype)
    ids = torch.tensor([3, 9, 0, 3])
    assert torch.equal(ops.embedding(ids, table), table[ids])
    outside = torch.tensor([1, -1, 10, 2**40, -(2**40), 2])
    got = ops.embedding(outside, table)
    assert got[1:5].isnan().all()
    assert torch.equal(got[[0, 5]], table[[1, 2]])
    many = torch.arange(1000) % 10
    with threads(2):
        assert torch.equal(ops.embedding(many, table), table[many])
    assert torch.equal(ops.embedding(ids, table[:, ::2]), table[ids][:, ::2])
    assert ops.embedding(ids[:0], table).shape == (0, 17)
