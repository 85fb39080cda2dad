"""Repacked linear layers give what plain ones give, for any number of rows."""

import pytest
import torch
from dovetail_cpu.linear import PackedLinear, _padded, can_pack
from torch.nn import functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (16,), (17,), (100,), (129,), (1025,), (2, 37)])
def test_values_are_those_of_a_plain_layer(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 64, generator=random).to(dtype)
    bias = torch.randn(48, generator=random).to(dtype)
    if not can_pack(weight):
        pytest.skip("this processor has no such kernels")
    x = torch.randn(*shape, 64, generator=random).to(dtype)
    got = PackedLinear(weight, bias)(x)
    assert got.shape == (*shape, 48)
    want = functional.linear(x.float(), weight.float(), bias.float())
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.2}[dtype]
    assert torch.allclose(got.float(), want, atol=tolerance)


def test_few_numbers_of_rows_are_computed_and_few_rows_in_vain() -> None:
    padded = [_padded(n) for n in range(1, 2049)]
    assert len(set(padded)) <= 72
    assert padded[:16] == list(range(1, 17))
    assert all(n <= m <= n * 1.125 for n, m in enumerate(padded, 1))
    assert _padded(2048) == 2048
    assert _padded(512) == 512
