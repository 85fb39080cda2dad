"""Weights in panels are the weights, however many pieces they come in."""

import pytest
import torch
from dovetail_cpu.kernels import Kernels, load_kernels
from dovetail_cpu.linear import PanelLinear, panels
from dovetail_cpu.memory import HugePages
from dovetail_cpu.platform import CpuPlatform
from torch import Tensor


@pytest.fixture
def kernels() -> Kernels:
    found = load_kernels()
    if found is None:
        pytest.skip("no kernels were compiled")
    return found


def drawn(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(sum(shape))
    return torch.randint(-(2**31), 2**31 - 1, shape, generator=random, dtype=torch.int32)


def plain(words: Tensor) -> Tensor:
    """The panels of whole rows of words, by torch."""
    num_columns, depth = words.shape
    whole = torch.zeros(-(-num_columns // 32) * 32, depth, dtype=torch.int32)
    whole[:num_columns] = words
    return whole.view(-1, 32, depth).transpose(1, 2)


@pytest.mark.parametrize("counts", [(1,), (32,), (64,), (37, 50), (5, 3, 90), (448, 64, 64)])
@pytest.mark.parametrize("depth", [1, 15, 16, 35, 448])
def test_panels_of_pieces_are_those_of_the_whole(
    counts: tuple[int, ...], depth: int, kernels: Kernels
) -> None:
    pieces = [drawn(count, depth) for count in counts]
    packed = panels(kernels, HugePages(), pieces)
    assert torch.equal(packed, plain(torch.cat(pieces)))


@pytest.mark.parametrize("shape", [(1, 4), (87, 140), (64, 4864)])
def test_bytes_are_added_up_with_their_signs(shape: tuple[int, int], kernels: Kernels) -> None:
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(-128, 128, shape, generator=random, dtype=torch.int8)
    sums = torch.full((-(-shape[0] // 32) * 32,), 7, dtype=torch.int32)
    panels(kernels, HugePages(), [codes.view(torch.int32)], sums)
    assert torch.equal(sums[: shape[0]], codes.sum(1, dtype=torch.int32))
    assert not sums[shape[0] :].any()


def test_a_layer_of_pieces_gives_the_bits_of_the_whole(kernels: Kernels) -> None:
    random = torch.Generator().manual_seed(0)
    pieces = [torch.randn(n, 96, generator=random).bfloat16() for n in (70, 10, 10)]
    bias = torch.randn(90, generator=random).bfloat16()
    x = torch.randn(5, 96, generator=random).bfloat16()
    whole = PanelLinear(kernels, HugePages(), torch.cat(pieces), bias)
    assert torch.equal(PanelLinear(kernels, HugePages(), pieces, bias)(x), whole(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_the_platform_binds_pieces_as_it_binds_the_whole(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    pieces = [torch.randn(n, 64, generator=random).to(dtype) for n in (40, 8, 8)]
    x = torch.randn(3, 64, generator=random).to(dtype)
    platform = CpuPlatform()
    got = platform.bind_rows(pieces, None)(x)
    assert torch.equal(got, platform.bind_linear(torch.cat(pieces), None)(x))
