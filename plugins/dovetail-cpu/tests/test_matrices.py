"""Products that are left to torch's matrix products, which run here whatever they run on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cpu_kernels import random_tensor
from dovetail_cpu import matrices
from dovetail_cpu.integers import Int8Panels
from dovetail_cpu.kernels import Kernels
from dovetail_cpu.linear import PanelLinear
from dovetail_cpu.memory import HugePages

SYMBOLS = matrices._symbols()
NEVER = matrices._NEVER


def use(kernels: Kernels, least_rows: int) -> None:
    assert SYMBOLS is not None
    pairs, fours, release = SYMBOLS
    kernels.use_matrices(pairs, least_rows, fours, least_rows, release)


@pytest.fixture
def switched(kernels: Kernels) -> Iterator[Kernels]:
    """Of the sets that torch's products of bf16 exist beside; vectors alone afterwards."""
    if not kernels.has_products:
        pytest.skip("torch has no products of bf16 for this instruction set")
    yield kernels
    use(kernels, NEVER)


def test_this_torch_has_them() -> None:
    assert SYMBOLS is not None
    assert all(SYMBOLS)


@pytest.mark.parametrize("num_rows", [1, 5, 37, 200])
@pytest.mark.parametrize("num_inputs", [34, 2050])
def test_bf16(num_inputs: int, num_rows: int, switched: Kernels, memory: HugePages) -> None:
    weight, bias = random_tensor(200, num_inputs), random_tensor(200, seed=1)
    layer, x = PanelLinear(switched, memory, weight, bias), random_tensor(num_rows, num_inputs)
    use(switched, 1)
    got, gated = layer(x), layer.gated(x, "silu_and_mul")
    use(switched, NEVER)
    for ours, theirs in ((layer(x), got), (layer.gated(x, "silu_and_mul"), gated)):
        slack = 2**-7 * ours.abs().amax().item()
        assert torch.allclose(ours.float(), theirs.float(), rtol=2**-7, atol=slack)


@pytest.mark.parametrize("num_rows", [1, 5, 37, 200])
@pytest.mark.parametrize("num_inputs", [35, 4100])
def test_8_bits_are_exact(
    num_inputs: int, num_rows: int, switched: Kernels, memory: HugePages
) -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (200, num_inputs), dtype=torch.int8, generator=random)
    layer = Int8Panels(switched, memory, codes, torch.rand(200, generator=random), None)
    x = random_tensor(num_rows, num_inputs)
    use(switched, 1)
    got = layer(x)
    use(switched, NEVER)
    assert torch.equal(got, layer(x))


@pytest.mark.parametrize(
    ("wins", "least"),
    [({4, 8, 16, 32, 64}, 4), ({16, 32, 64}, 16), ({4, 32, 64}, 32), (set(), NEVER), ({4}, NEVER)],
)
def test_from_where_on_they_win(wins: set[int], least: int) -> None:
    def seconds(rows: int, from_rows: int) -> float:
        return 1.0 if from_rows == NEVER else 0.5 if rows in wins else 2.0

    assert matrices._least_rows(seconds) == least


def test_a_trial_decides(switched: Kernels) -> None:
    matrices.use_matrix_units.cache_clear()
    assert "matrix units from" in matrices.use_matrix_units(switched)
