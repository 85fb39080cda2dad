"""Linear layers in bfloat16 against float32, and each row's bits in any company."""

from __future__ import annotations

import pytest
import torch
from cpu_kernels import random_tensor, threads
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.linear import PanelLinear, can_gate
from dovetail_cpu.memory import HugePages
from torch import Tensor
from torch.nn import functional

from dovetail.platforms.torch.ops import references

ROWS = (*range(1, 14), 16, 17, 33, 47, 48, 49, 96, 97, 128, 129, 200, 700)
COLUMNS = (1, 16, 31, 32, 33, 64, 100, 1000)
INPUTS = (2, 34, 1024, 4098)


def in_float32(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())


def expect_near(got: Tensor, want: Tensor) -> None:
    """Two roundings to bfloat16, and what sums in another order differ by."""
    assert got.dtype is torch.bfloat16
    assert got.shape == want.shape
    slack = 1e-4 * want.abs().amax().item() + 1e-6
    assert torch.allclose(got.float(), want, rtol=2**-7, atol=slack)


@pytest.mark.parametrize("num_inputs", INPUTS)
@pytest.mark.parametrize("num_columns", COLUMNS)
def test_values_are_those_of_float32(
    num_columns: int, num_inputs: int, kernels: Kernels, memory: HugePages
) -> None:
    weight, x = random_tensor(num_columns, num_inputs), random_tensor(700, num_inputs, seed=1)
    bias = random_tensor(num_columns, seed=2) if num_columns % 2 else None
    layer = PanelLinear(kernels, memory, weight, bias)
    want = in_float32(x, weight, bias)
    for count in ROWS:
        for num in (1, 2):
            with threads(num):
                expect_near(layer(x[:count]), want[:count])


def test_rows_may_be_apart_and_in_any_shape(kernels: Kernels, memory: HugePages) -> None:
    weight, wide = random_tensor(48, 34), random_tensor(20, 100)
    layer = PanelLinear(kernels, memory, weight, None)
    part = wide[:, 10:44]
    want = in_float32(part, weight, None)
    expect_near(layer(part), want)
    expect_near(layer(part[::3]), want[::3])
    expect_near(layer(part[:1].expand(5, -1)), want[:1].expand(5, -1))
    expect_near(layer(part.unflatten(0, (4, 5))), want.unflatten(0, (4, 5)))
    expect_near(layer(part[0]), want[0])
    turned = part.t().contiguous().t()
    expect_near(layer(turned), want)


def test_no_rows_are_no_results(kernels: Kernels, memory: HugePages) -> None:
    layer = PanelLinear(kernels, memory, random_tensor(64, 34), None)
    assert layer(torch.empty(0, 34, dtype=torch.bfloat16)).shape == (0, 64)


@pytest.mark.parametrize("name", ["silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize("num_columns", [32, 64, 96, 1024, 30])
def test_gates_are_those_of_the_ops(
    num_columns: int, name: str, kernels: Kernels, memory: HugePages
) -> None:
    weight, bias = random_tensor(num_columns, 34), random_tensor(num_columns, seed=2)
    assert can_gate(num_columns) == (num_columns != 30)
    layer = PanelLinear(kernels, memory, weight, bias)
    x = random_tensor(100, 34, seed=1)
    want = references()[name](in_float32(x, weight, bias))
    slack = 2**-7 * want.abs().amax().item()
    for count in (1, 5, 49, 100):
        got = layer.gated(x[:count], name).float()
        # Where the layer cannot gate, its result is rounded in between.
        assert torch.allclose(got, want[:count], rtol=2**-6, atol=slack)
        if can_gate(num_columns):
            assert torch.allclose(got, want[:count], rtol=2**-7, atol=slack / 64)


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row(
    wrong: float, kernels: Kernels, memory: HugePages
) -> None:
    layer = PanelLinear(kernels, memory, random_tensor(64, 34), None)
    for count in (1, 5, 13, 60):
        x = random_tensor(count, 34, seed=1)
        plain = layer(x)
        x[count // 2, 5] = wrong
        got = layer(x)
        assert not got[count // 2].isfinite().any()
        others = torch.arange(count) != count // 2
        assert torch.equal(got[others], plain[others])


@pytest.mark.parametrize("gate", [None, "silu_and_mul", "gelu_tanh_and_mul"])
@pytest.mark.parametrize(("num_columns", "num_inputs"), [(64, 34), (992, 1024), (96, 4098)])
def test_a_rows_bits_are_the_same_in_any_company(
    num_columns: int, num_inputs: int, gate: str | None, kernels: Kernels, memory: HugePages
) -> None:
    layer = PanelLinear(kernels, memory, random_tensor(num_columns, num_inputs), None)
    x = random_tensor(1100, num_inputs, seed=1)

    def outputs(rows: Tensor) -> Tensor:
        return layer(rows) if gate is None else layer.gated(rows, gate)

    alone = torch.cat([outputs(x[i : i + 1]) for i in range(8)])
    for count in (7, 17, 33, 47, 60, 97, 129, 300, 1100):
        for num in (1, 2):
            with threads(num):
                shared = min(count, 8)
                assert torch.equal(outputs(x[:count])[:shared], alone[:shared])
                moved = outputs(x.roll(count - shared, 0)[:count])[count - shared :]
                assert torch.equal(moved, alone[:shared])
