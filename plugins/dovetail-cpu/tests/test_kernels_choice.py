"""The choice of tokens by the kernels, against the sampler's own."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from cpu_kernels import NAMES, kernels_of, random_tensor, threads
from dovetail_cpu.choice import choose_rows
from dovetail_cpu.kernels import Kernels
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dovetail.core.batch import SamplingBatch
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.sampler import Sampler
from dovetail.platforms.torch.sampling.choice import choose
from dovetail.platforms.torch.sampling.order import greedy
from dovetail.platforms.torch.sampling.rows import Rows
from tests.platforms.torch.fixed_cases import KINDS, choice_cases, odd_rows
from tests.platforms.torch.sampling_cases import (
    CPU,
    all_params,
    batch_of,
    joined,
    logits_of,
    noise_of,
)

NAN, INFINITY = float("nan"), float("inf")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def likeliest(kernels: Kernels, logits: Tensor) -> tuple[Tensor, Tensor]:
    count = len(logits)
    return choose_rows(kernels, Rows(logits), np.arange(count), SamplingBatch.greedy(count))


def expect_same(
    kernels: Kernels, logits: Tensor, params: list[SamplingParams], noise: Any, which: Any = None
) -> None:
    """What is chosen for rows ``which``; by default for all."""
    sampling = batch_of(params, logits.shape[1], noise=noise).sampling
    which = np.arange(len(logits)) if which is None else which
    rows, before = Rows(logits).subset(which), logits.clone()
    want, want_finite = choose(rows, which, sampling)
    for num in (1, 2):
        with threads(num):
            got, finite = choose_rows(kernels, rows, which, sampling)
        assert torch.equal(finite, want_finite)
        assert torch.equal(got, want)
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1000, 8192, 50257])
def test_every_kind_of_row(vocab: int, dtype: torch.dtype, kernels: Kernels) -> None:
    noise = noise_of(len(KINDS), seed=vocab)
    logits = logits_of(len(KINDS), vocab, dtype=dtype)
    expect_same(kernels, logits, KINDS, noise)
    wide = logits_of(len(KINDS), 2 * vocab, dtype=dtype)
    expect_same(kernels, wide[:, ::2], KINDS, noise)
    expect_same(kernels, wide[:, vocab:], KINDS, noise)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=200, deadline=None)
@given(case=choice_cases(st))
def test_random_rows_with_ties_and_any_controls(name: str, case: Any) -> None:
    expect_same(kernels_of(name), *case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", KINDS)
def test_rows_that_are_not_finite(
    params: SamplingParams, dtype: torch.dtype, kernels: Kernels
) -> None:
    rows = odd_rows(300, dtype)
    expect_same(kernels, rows, [params] * len(rows), [0.5] * len(rows))


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 3.0, 10.0])
def test_flat_and_steep_rows(scale: float, kernels: Kernels) -> None:
    """Some need a few of the likeliest tokens, some more, some nearly all of them."""
    params = [
        SamplingParams(top_p=0.5),
        SamplingParams(top_p=0.999),
        SamplingParams(min_p=0.001),
        SamplingParams(min_p=0.5, top_p=0.9),
        SamplingParams(top_k=700, top_p=0.9),
        SamplingParams(top_k=30_000),
    ]
    for dtype in (torch.float32, torch.bfloat16):
        logits = logits_of(len(params), 40_000, scale=scale, dtype=dtype)
        expect_same(kernels, logits, params, noise_of(len(params)))


def test_a_row_does_not_depend_on_the_others(kernels: Kernels) -> None:
    count = len(KINDS)
    logits, noise = logits_of(count, 3001, dtype=torch.bfloat16), noise_of(count)
    sampling = batch_of(KINDS, 3001, noise=noise).sampling
    whole, _ = choose_rows(kernels, Rows(logits), np.arange(count), sampling)
    for place in range(count):
        which = np.array([place])
        alone, _ = choose_rows(kernels, Rows(logits).subset(which), which, sampling)
        assert alone[0] == whole[place]
    expect_same(kernels, logits, KINDS, noise, np.array([2, 3, 5, 11]))


def test_draws_have_the_distribution(kernels: Kernels) -> None:
    logits = torch.tensor([[0.5, 2.0, -1.0, 1.0, 3.0]]).repeat(20_000, 1)
    params = [SamplingParams(temperature=0.7, top_k=4)] * len(logits)
    sampling = batch_of(params, 5, noise=noise_of(len(logits))).sampling
    tokens, _ = choose_rows(kernels, Rows(logits), np.arange(len(logits)), sampling)
    want = (logits[0] / 0.7).masked_fill(logits[0] == -1.0, -INFINITY).softmax(-1)
    got = torch.bincount(tokens, minlength=5) / len(logits)
    assert torch.allclose(got, want, atol=0.015)
    assert got[2] == 0


@pytest.mark.parametrize("vocab", [70, 9000])
def test_the_sampler_says_the_same_with_it(vocab: int, kernels: Kernels) -> None:
    """Rows with rules of their own besides, whose logits are in float32."""
    params = all_params()
    logits = logits_of(len(params), vocab, dtype=torch.bfloat16)
    batch = batch_of(params, vocab, noise=noise_of(len(params)))
    results = []
    for chooser in (choose, partial(choose_rows, kernels)):
        sampler = Sampler(vocab, 16, CPU, chooser)
        sampler.join([joined(i, p, (1, 2), (3,)) for i, p in enumerate(params)])
        results.append([sampler.sample(logits, batch).token_ids for _ in range(4)])
    for want, got in zip(*results, strict=True):
        assert torch.equal(got, want)


# The likeliest

SIZES = (1, 2, 15, 16, 17, 8191, 8192, 8193, 16384, 16385, 50000)


@pytest.mark.parametrize("size", SIZES)
def test_likeliest_is_what_greedy_is(size: int, kernels: Kernels) -> None:
    logits = random_tensor(9, size, seed=size)  # of so many numbers in bfloat16, some are equal
    logits[1] = 1.0
    logits[2] = -INFINITY
    logits[3, size // 2] = INFINITY
    logits[3, -1] = INFINITY
    logits[4, -1] = NAN
    logits[5, 0] = NAN
    logits[6] = -INFINITY
    logits[6, -1] = -3e38
    logits[7] = NAN
    logits[8] = -0.0
    logits[8, size // 3] = 0.0
    for rows in (logits, logits[:1], logits[:, ::2] if size > 1 else logits):
        want, values = greedy(rows)
        for num in (1, 2):
            with threads(num):
                ids, finite = likeliest(kernels, rows)
            assert torch.equal(finite, values.isfinite())
            assert torch.equal(ids, torch.where(finite, want, 0))


def test_of_equal_ones_the_lowest(kernels: Kernels) -> None:
    logits = torch.zeros(6, 20000, dtype=torch.bfloat16)
    for row, places in enumerate([(5, 19999), (8191, 8192), (8192, 16384), (16, 17), (0, 1), ()]):
        logits[row, list(places)] = 1
    ids, finite = likeliest(kernels, logits)
    assert ids.tolist() == [5, 8191, 8192, 16, 0, 0]
    assert finite.all()


def test_of_no_rows(kernels: Kernels) -> None:
    ids, finite = likeliest(kernels, torch.empty(0, 100, dtype=torch.bfloat16))
    assert len(ids) == len(finite) == 0
