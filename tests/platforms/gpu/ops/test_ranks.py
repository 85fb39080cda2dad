"""Tokens as numbers: their order, and how weights are rounded."""

import pytest
import torch
import triton
import triton.language as tl

from dovetail.platforms.gpu.ops.choice import _SHIFTS
from dovetail.platforms.gpu.ops.ranks import least_rank, rank_beyond, rank_of, value_of, weigh
from tests.platforms.gpu.ops.devices import DEVICE

SIZE, ID_BITS = 256, 8


@triton.jit
def _rank(x_ptr, out_ptr, SHIFT: tl.constexpr, SIZE: tl.constexpr, ID_BITS: tl.constexpr):
    ids = tl.arange(0, SIZE)
    x = tl.load(x_ptr + ids)
    rank = rank_of(x, ids, ID_BITS, SHIFT)
    tl.store(out_ptr + ids, rank)
    tl.store(out_ptr + SIZE + ids, least_rank(x, ID_BITS, SHIFT))
    tl.store(out_ptr + 2 * SIZE + ids, rank_beyond(x, ID_BITS, SHIFT))
    tl.store(x_ptr + ids, value_of(rank, ID_BITS, SHIFT))


@triton.jit
def _weigh(out_ptr, UNITS: tl.constexpr):
    at = tl.arange(0, 4)
    _scaled, weight = weigh(at * 0.0, 0.0, 1.0, UNITS)
    tl.store(out_ptr + at, weight)


@pytest.mark.parametrize("dtype", _SHIFTS)
def test_ranks_have_the_order_of_a_stable_sort_and_hold_the_logit(dtype):
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(0)).to(dtype).float()
    x[::3] = (x[::3] * 4).round() / 4
    x[5:9] = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0])
    x[9], x[10] = torch.finfo(dtype).max, torch.finfo(dtype).tiny
    values, out = x.to(DEVICE), torch.empty(3, SIZE, dtype=torch.int64, device=DEVICE)
    _rank[(1,)](values, out, _SHIFTS[dtype], SIZE, ID_BITS)
    rank, least, beyond = out.cpu()
    assert torch.equal(values.cpu(), x)
    expected = torch.sort(x, descending=True, stable=True).indices
    assert torch.equal(torch.argsort(rank, descending=True), expected)
    level = x[:, None] == x
    assert torch.equal((rank >= least[:, None]) & (rank < beyond[:, None]), level)


WHOLE = [(0.5, 0), (1.5, 2), (2.5, 2), (2.6, 3), (8388606.5, 8388606), (8388607.5, 8388608)]
ABOVE = [(12582913.0, 12582913), (2.0**34, 2**34), (2.0**51, 2**51)]


@pytest.mark.parametrize(("units", "weight"), [*WHOLE, *ABOVE])
def test_weights_are_rounded_to_the_nearest_and_of_two_to_the_even(units, weight):
    out = torch.empty(4, dtype=torch.int64, device=DEVICE)
    _weigh[(1,)](out, units)
    assert out.tolist() == [weight] * 4
