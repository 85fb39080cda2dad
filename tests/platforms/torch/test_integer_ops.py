"""Linear layers over integers: what is exact, what rows depend on, and rows without numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dovetail.platforms.torch.ops import references

OPS = references()
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS = 7


def random(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def bound(bits: int, width: int, out: int = 33, *, biased: bool = True) -> Any:
    """A layer of that many bits."""
    draw = random(bits)
    bias = torch.from_numpy(draw.standard_normal(out, np.float32)) if biased else None
    if bits == 8:
        codes = draw.integers(-127, 128, (out, width)).astype(np.int8)
        scales = draw.uniform(0.5, 2, out).astype(np.float32)
    else:
        codes = draw.integers(0, 256, (out, width // 2)).astype(np.uint8)
        scales = draw.uniform(-2, 2, (out, width // 64)).astype(np.float32)
    return OPS[f"int{bits}_weight"](torch.from_numpy(codes), torch.from_numpy(scales), bias)


def apply(bits: int, x: Tensor, weight: Any) -> Tensor:
    out: Tensor = OPS[f"int{bits}_linear"](x, weight)
    return out


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.from_numpy(random(seed).standard_normal(shape, np.float32)).to(dtype)


def test_the_sum_of_int8_is_exact_where_float32_is_not() -> None:
    width = 5000
    x = random().integers(90, 128, (ROWS, width))
    x[:, 0] = 127  # The step is 1, and so the codes are x.
    codes = random(1).integers(90, 128, (9, width)).astype(np.int8)
    sums = x @ codes.T.astype(np.int64)
    assert sums.min() > 2**24 and (sums % 2).any()
    weight = OPS["int8_weight"](torch.from_numpy(codes), torch.ones(9), None)
    got = apply(8, torch.from_numpy(x.astype(np.float32)), weight)
    assert np.array_equal(got.numpy(), sums.astype(np.float32))


def test_the_sums_of_int4_are_those_of_whole_numbers() -> None:
    width = 192
    x = random().integers(-127, 128, (ROWS, width))
    x[:, 5] = 127
    values = random(1).integers(-8, 8, (9, width))
    codes = (values[:, ::2] + 8) | (values[:, 1::2] + 8) << 4
    powers = 2.0 ** random(2).integers(-3, 4, (9, 3))  # Products and sums of them are exact.
    weight = OPS["int4_weight"](
        torch.from_numpy(codes.astype(np.uint8)), torch.from_numpy(powers).float(), None
    )
    got = apply(4, torch.from_numpy(x.astype(np.float32)), weight)
    assert np.array_equal(got.numpy(), x @ (values * powers.repeat(64, axis=1)).T)


def test_halves_go_to_the_even_code() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 125.5]])
    weight = OPS["int8_weight"](torch.eye(8, dtype=torch.int8), torch.ones(8), None)
    assert apply(8, x, weight)[0].tolist() == [127, 0, 2, 2, 0, -2, -2, 126]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_does_not_depend_on_the_others(bits: int, dtype: torch.dtype) -> None:
    x = drawn(ROWS, 1088, dtype=dtype)
    x[2] *= 100
    weight = bound(bits, 1088)
    together = apply(bits, x, weight)
    assert together.dtype == dtype
    for row in range(ROWS):
        assert torch.equal(together[row : row + 1], apply(bits, x[row : row + 1], weight))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_a_row_with_no_number_in_it_is_nan_and_no_other_is(bits: int, wrong: float) -> None:
    x, weight = drawn(ROWS, 128), bound(bits, 128)
    want = apply(bits, x, weight)
    x[3, 77] = wrong
    got = apply(bits, x, weight)
    assert got[3].isnan().all()
    others = [row for row in range(ROWS) if row != 3]
    assert torch.equal(got[others], want[others])


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-40, 1e-37, 1e30])
@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_any_size(bits: int, size: float) -> None:
    """What is too small for a step counts as zero."""
    x = drawn(2, 128).sign() * torch.tensor(size)
    weight = bound(bits, 128, biased=False)._replace(scales=bound(bits, 128).scales / 1e4)
    got = apply(bits, x, weight)
    if size / 127 < 2.0**-126:
        assert (got == 0).all()
    else:
        ones = apply(bits, x.sign(), weight)
        assert torch.allclose(got / size, ones, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bits", [8, 4])
def test_leading_axes_stay(bits: int) -> None:
    x, weight = drawn(2, 3, 64), bound(bits, 64)
    assert torch.equal(apply(bits, x, weight), apply(bits, x.view(6, 64), weight).view(2, 3, -1))
    assert apply(bits, x[:0], weight).shape == (0, 3, 33)


@pytest.mark.parametrize("bits", [8, 4])
def test_the_bias_is_added_before_the_result_is_rounded(bits: int) -> None:
    x, weight = drawn(ROWS, 64, dtype=torch.bfloat16), bound(bits, 64)
    exact = apply(bits, x.float(), weight._replace(bias=None)) + weight.bias
    assert torch.equal(apply(bits, x, weight), exact.bfloat16())
