from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from dovetail.core.contracts.ops import OpTable
from dovetail.core.contracts.platform import Capabilities, Memory
from dovetail.platforms.torch.invariant import InvariantLinear, InvariantPlatform, steady_sizes
from dovetail.platforms.torch.ops import DenseLinear, references
from dovetail.platforms.torch.platform import BoundLinear, TorchPlatform
from dovetail.platforms.torch.steady import steady


@pytest.fixture(params=[1, 2, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [96, 100, 1200])
def test_steady_functions_do_not_look_at_the_neighbours(
    width: int, dtype: torch.dtype, threads: int
) -> None:
    x = (3 * drawn(700, width)).to(dtype)
    for function in (functional.silu, functional.gelu, torch.tanh, torch.sigmoid):
        whole = steady(function, x)
        assert torch.allclose(whole, function(x), rtol=2e-2 if dtype.itemsize == 2 else 1e-5)
        for start, count in ((0, 1), (3, 1), (1, 5), (7, 47), (100, 171), (5, 513)):
            part = slice(start, start + count)
            assert torch.equal(steady(function, x[part]), whole[part])


class Fickle:
    """Sums in another order for ``odd_sizes``, and at row 3 of every input if ``by_place``."""

    def __init__(self, weight: Tensor, odd_sizes: set[int], by_place: bool = False) -> None:
        self.weight, self.odd_sizes, self.by_place = weight, odd_sizes, by_place

    def forwards(self, x: Tensor) -> Tensor:
        products = x.float()[:, None] * self.weight.float()
        total = products[..., 0]
        for i in range(1, products.shape[-1]):
            total = total + products[..., i]
        return total.to(x.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        backwards = Fickle(self.weight.flip(1), set()).forwards(x.flip(1))
        if len(x) in self.odd_sizes:
            return backwards
        out = self.forwards(x)
        if self.by_place and len(x) > 3:
            out[3] = backwards[3]
        return out


def test_sizes_at_which_rows_get_other_bits_are_left_out() -> None:
    x, weight = drawn(128, 8), drawn(5, 8)
    assert steady_sizes(Fickle(weight, set()), x)[:3] == (1, 2, 4)
    assert steady_sizes(Fickle(weight, {1, 4}), x)[:3] == (2, 8, 12)
    assert steady_sizes(Fickle(weight, set(), by_place=True), x) == (1, 2)


def test_a_step_is_padded_and_cut_to_steady_sizes() -> None:
    seen: list[int] = []

    def layer(x: Tensor) -> Tensor:
        seen.append(len(x))
        return x * 2

    x = drawn(21, 3)
    assert torch.equal(InvariantLinear(layer, (2, 8))(x), x * 2)
    assert seen == [8, 8, 8]
    seen.clear()
    assert torch.equal(InvariantLinear(layer, (2, 8))(x[:1]), x[:1] * 2)
    assert seen == [2]


class Platform(TorchPlatform):
    """Its kernel for up to three rows sums in another order."""

    name = "fickle"
    device = torch.device("cpu")
    capabilities = Capabilities(
        family="torch", dtypes=("float32",), kv_dtypes=("auto",), block_sizes=(16,)
    )

    def device_names(self) -> list[str]:
        return ["fickle"]

    def memory(self, device: int = 0) -> Memory:
        return Memory(free=1, total=2)

    def bind_linear(self, weight: Tensor, bias: Tensor | None) -> BoundLinear:
        return Fickle(weight, {1, 2, 3})

    def override_ops(self, table: OpTable) -> None:
        table.override("relu", lambda x: x, origin="fickle")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rounding_to_16_bits_does_not_hide_the_order(dtype: torch.dtype) -> None:
    platform = InvariantPlatform(Platform())
    layer = platform.bind_linear(drawn(4, 12).to(dtype), None)
    x = drawn(300, 12).to(dtype)
    whole = layer(x)
    assert torch.equal(torch.cat([layer(row[None]) for row in x]), whole)
    assert torch.equal(whole, Fickle(drawn(4, 12).to(dtype), set())(x))


def test_the_ops_of_the_platform_are_left_out() -> None:
    table = OpTable(references())
    platform = InvariantPlatform(Platform())
    platform.override_ops(table)
    assert "relu" not in table.overrides
    x = drawn(3, 8)
    for name in table.overrides:
        extra = (2.0,) if name == "soft_cap" else ()
        assert torch.allclose(table.bind().__dict__[name](x, *extra), references()[name](x, *extra))
    assert (platform.name, platform.memory().free, platform.device_names()) == (
        "fickle",
        1,
        ["fickle"],
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("width", "out"), [(64, 384), (4864, 896), (100, 7)])
def test_layers_of_the_host(width: int, out: int, dtype: torch.dtype, threads: int) -> None:
    """Dense layers too, whose kernels change with the number of rows."""

    class Dense(Platform):
        def bind_linear(self, weight: Tensor, bias: Tensor | None) -> BoundLinear:
            return DenseLinear(weight, bias)

    layer = InvariantPlatform(Dense()).bind_linear(drawn(out, width).to(dtype), None)
    x = drawn(301, width).to(dtype)
    whole = layer(x)
    for start, count in ((0, 1), (5, 2), (9, 3), (1, 7), (0, 33), (100, 65), (3, 200)):
        assert torch.equal(layer(x[start : start + count]), whole[start : start + count])
