"""Linear layers over 8 and 4 bits against the references, whose sums are exact too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cpu_kernels import random_tensor, threads
from dovetail_cpu.integers import Int4Panels, Int8Panels
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.memory import HugePages
from torch import Tensor

from dovetail.core.contracts.ops import INT4_GROUP
from dovetail.platforms.torch import integer_ops
from dovetail.platforms.torch.ops import references

ROWS = (1, 2, 5, 6, 13, 48, 97, 200)
DTYPES = (torch.bfloat16, torch.float32, torch.float16)
RTOL = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-6}
GATED_RTOL = {torch.bfloat16: 2**-7, torch.float16: 2**-8, torch.float32: 2**-8}
"""Gates are as exact as bfloat16 needs; the reference rounds between activation and product."""
NAN, INFINITY = float("nan"), float("inf")


class Pair:
    """A layer by the kernels, and its reference."""

    def __init__(
        self, kernels: Kernels, memory: HugePages, bits: int, size: tuple[int, int], bias: bool
    ) -> None:
        columns, inputs = size
        random = torch.Generator().manual_seed(0)
        self.bits, self.num_inputs = bits, inputs
        self.bias = random_tensor(columns, seed=2) if bias else None
        panels: Any = Int8Panels if bits == 8 else Int4Panels
        if bits == 8:
            codes = torch.randint(-127, 128, (columns, inputs), generator=random).to(torch.int8)
            scales = torch.rand(columns, generator=random) / 100 + 1e-3
        else:
            shape = (columns, inputs // 2)
            codes = torch.randint(0, 256, shape, generator=random, dtype=torch.uint8)
            scales = torch.rand(columns, inputs // INT4_GROUP, generator=random) / 10 + 1e-2
        self.layer = panels(kernels, memory, codes, scales, self.bias)
        make = integer_ops.int8_weight if bits == 8 else integer_ops.int4_weight
        self.weight = make(codes, scales, self.bias)

    def want(self, x: Tensor) -> Tensor:
        linear = integer_ops.int8_linear if self.bits == 8 else integer_ops.int4_linear
        return linear(x, self.weight)

    def inputs(self, count: int, dtype: torch.dtype) -> Tensor:
        return random_tensor(count, self.num_inputs, seed=1, dtype=dtype)


def expect_near(got: Tensor, want: Tensor, rtol: float) -> None:
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    slack = 4e-7 * want.abs().nan_to_num().max().item() if want.numel() else 0.0
    slack += 1e-30
    assert torch.allclose(got.float(), want.float(), rtol=rtol, atol=slack, equal_nan=True)


SIZES = {
    8: [(1, 1), (31, 3), (16, 5), (33, 33), (64, 64), (100, 130), (1000, 256), (32, 8192)],
    4: [(1, 64), (16, 128), (33, 64), (100, 192), (1000, 256), (64, 4160)],
}
EACH = [(bits, size) for bits, sizes in SIZES.items() for size in sizes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "size"), EACH)
def test_values_are_those_of_the_reference(
    bits: int, size: tuple[int, int], dtype: torch.dtype, kernels: Kernels, memory: HugePages
) -> None:
    pair = Pair(kernels, memory, bits, size, bias=size[0] % 2 == 0)
    x = pair.inputs(200, dtype)
    want = pair.want(x)
    for count in ROWS:
        for num in (1, 2):
            with threads(num):
                expect_near(pair.layer(x[:count]), want[:count], RTOL[dtype])


def test_sums_beyond_what_float32_counts_are_exact(kernels: Kernels, memory: HugePages) -> None:
    inputs, ones = 8192, torch.ones(2)
    codes = torch.full((2, inputs), 127, dtype=torch.int8)
    codes[1, ::2] = -127
    x = torch.full((3, inputs), 127.0)
    x[1, 0], x[2, 1] = 126.0, -127.0
    got = Int8Panels(kernels, memory, codes, ones, None)(x)
    exact = torch.round(x).long() @ codes.long().t()
    assert exact.max() > 2**24
    assert torch.equal(got, exact.float())


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_largest_codes_do_not_overflow(
    bits: int, sign: int, kernels: Kernels, memory: HugePages
) -> None:
    # Some instruction sets add products in 16 bits, which end at 32767.
    x = torch.full((13, 256), 127.0 * sign)
    if bits == 8:
        least = torch.full((64, 256), -128, dtype=torch.int8)
        got = Int8Panels(kernels, memory, least, torch.ones(64), None)(x)
        assert torch.equal(got, torch.full((13, 64), -128 * 127.0 * 256 * sign))
        return
    # Halves of 0 and of 15 stand for -8 and 7, and are what the kernels multiply.
    for half, value in ((0, -8), (15, 7)):
        codes = torch.full((64, 128), half * 17, dtype=torch.uint8)
        got = Int4Panels(kernels, memory, codes, torch.ones(64, 4), None)(x)
        assert torch.equal(got, torch.full((13, 64), value * 127.0 * 256 * sign))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize("bits", [8, 4])
def test_gates_are_those_of_the_ops(
    bits: int, name: str, dtype: torch.dtype, kernels: Kernels, memory: HugePages
) -> None:
    for columns in (32, 96, 30):
        pair = Pair(kernels, memory, bits, (columns, 128), bias=True)
        x = pair.inputs(60, dtype)
        want = references()[name](pair.want(x.float()))
        for count in (1, 7, 60):
            got = pair.layer.gated(x[:count], name)
            assert got.dtype is dtype
            slack = GATED_RTOL[dtype] * want[:count].abs().max().item()
            assert torch.allclose(got.float(), want[:count], rtol=GATED_RTOL[dtype], atol=slack)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_zeros_and_of_tiny_numbers(
    bits: int, dtype: torch.dtype, kernels: Kernels, memory: HugePages
) -> None:
    pair = Pair(kernels, memory, bits, (33, 64), bias=False)
    x = pair.inputs(4, dtype)
    x[0] = 0
    x[1] *= 1e-6
    x[2] = 0
    x[2, 3] = torch.finfo(dtype).smallest_normal / 8
    expect_near(pair.layer(x), pair.want(x), RTOL[dtype])
    assert not pair.layer(x)[0].any()
    biased = Pair(kernels, memory, bits, (33, 64), bias=True)
    assert biased.bias is not None
    assert torch.equal(biased.layer(x)[0], biased.bias.to(dtype))


@pytest.mark.parametrize("wrong", [NAN, INFINITY, -INFINITY])
@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_not_finite_makes_its_row_so_and_no_other(
    bits: int, wrong: float, kernels: Kernels, memory: HugePages
) -> None:
    pair = Pair(kernels, memory, bits, (64, 64), bias=True)
    for dtype in DTYPES:
        for count in (1, 5, 60):
            x = pair.inputs(count, dtype)
            plain = pair.layer(x)
            x[count // 2, 17] = wrong
            got = pair.layer(x)
            assert got[count // 2].isnan().all()
            others = torch.arange(count) != count // 2
            assert torch.equal(got[others], plain[others])


@pytest.mark.parametrize(("bits", "size"), [(8, (992, 130)), (8, (64, 8192)), (4, (992, 192))])
def test_a_rows_bits_are_the_same_in_any_company(
    bits: int, size: tuple[int, int], kernels: Kernels, memory: HugePages
) -> None:
    layer = Pair(kernels, memory, bits, size, bias=True).layer
    x = random_tensor(200, size[1], seed=1)
    for outputs in (layer, lambda rows: layer.gated(rows, "silu_and_mul")):
        alone = torch.cat([outputs(x[i : i + 1]) for i in range(7)])
        for count in (7, 60, 97, 200):
            for num in (1, 2):
                with threads(num):
                    assert torch.equal(outputs(x[:count])[:7], alone)
                    moved = outputs(x.roll(count - 7, 0)[:count])[count - 7 :]
                    assert torch.equal(moved, alone)


@pytest.mark.parametrize("bits", [8, 4])
def test_any_shape_and_no_rows(bits: int, kernels: Kernels, memory: HugePages) -> None:
    pair = Pair(kernels, memory, bits, (33, 64), bias=False)
    assert pair.layer(torch.empty(0, 64)).shape == (0, 33)
    x = random_tensor(64, 6, seed=1).t()
    want = pair.want(x)
    expect_near(pair.layer(x), want, RTOL[x.dtype])
    expect_near(pair.layer(x.unflatten(0, (2, 3))), want.unflatten(0, (2, 3)), RTOL[x.dtype])
    expect_near(pair.layer(x[0]), want[0], RTOL[x.dtype])
