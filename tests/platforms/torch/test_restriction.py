"""What min_p, top_k and top_p leave: two fast ways against the full sort."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.sampling.limited import Limited
from dovetail.platforms.torch.sampling.order import greedy, likeliest
from dovetail.platforms.torch.sampling.restriction import by_search, by_sort
from dovetail.platforms.torch.sampling.rows import Rows
from dovetail.platforms.torch.sampling.weights import (
    Controls,
    draw_from_all,
    draw_from_few,
    unit,
    weights,
)
from tests.platforms.torch.sampling_cases import CPU, batch_of, noise_of, probabilities

LAST = 1 - 2.0**-24


@st.composite
def cases(draw):
    """Logits with few distinct values, so that ties are everywhere, and any controls."""
    vocab = draw(st.sampled_from([1, 2, 5, 63, 64, 65, 200, 700, 5000]))
    count = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 1 << 30)))
    x = rng.normal(size=(count, vocab)) * draw(st.sampled_from([0.0, 0.02, 1.0, 4.0, 30.0]))
    step = draw(st.sampled_from([0.0, 0.25, 1.0, 8.0]))
    if step:
        x = np.round(x / step) * step
    x[rng.random(x.shape) < draw(st.sampled_from([0.0, 0.5]))] = -np.inf
    x[:, rng.integers(vocab)] = 0.0
    x[:, rng.integers(vocab)] = -0.0
    params = [
        SamplingParams(
            temperature=draw(st.sampled_from([0.01, 0.5, 1.0, 3.0, 100.0])),
            top_k=min(vocab, draw(st.sampled_from([0, 0, 1, 2, 50, 64, 65, 600, 1500, vocab]))),
            top_p=draw(st.sampled_from([1.0, 1.0, 1e-6, 0.25, 0.5, 0.95, 0.9999])),
            min_p=draw(st.sampled_from([0.0, 0.0, 1e-4, 0.1, 1.0])),
        )
        for _ in range(count)
    ]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    noise = draw(st.lists(st.sampled_from([0.0, 0.3, 0.77, LAST]), min_size=count, max_size=count))
    return torch.tensor(x, dtype=torch.float32).to(dtype), params, noise


@settings(max_examples=300, deadline=None)
@given(cases())
def test_both_fast_ways_keep_exactly_what_the_sort_keeps(case):
    x, params, noise = case
    sampling = batch_of(params, x.shape[1], noise=noise).sampling
    everyone = np.arange(len(x))
    limited = Limited.of(Rows(x), everyone, sampling)
    controls = limited.controls
    expected = by_sort(x.float(), controls)
    ids = torch.arange(x.shape[1])
    kept = expected.keeps(x.float(), ids)

    found = by_search(limited.rows, limited.peak, controls, counts=True)
    assert torch.equal(found.keeps(x.float(), ids), kept)
    if not any(p.top_k for p in params):
        same = by_search(limited.rows, limited.peak, controls, counts=False)
        assert torch.equal(same.keeps(x.float(), ids), kept)

    tokens = draw_from_all(limited.rows, limited.peak, controls, expected)
    assert torch.equal(limited.draw(), tokens)
    for k in (1, 3, 64, 512):
        few = limited.look(k)
        sure = few.covered
        boundary = few.boundary()
        assert torch.equal(boundary.keeps(x.float(), ids)[sure], kept[sure])
        drawn = draw_from_few(few.ids, few.weights, controls.uniform)
        assert torch.equal(drawn[sure], tokens[sure])
        assert sure[[0 < p.top_k <= k for p in params]].all()
    assert kept.gather(1, tokens[:, None]).all()
    assert not torch.isinf(x.gather(1, tokens[:, None])).any()


@settings(max_examples=100, deadline=None)
@given(cases(), st.sampled_from([1, 2, 7, 64, 300]))
def test_likeliest_is_the_beginning_of_a_stable_sort(case, k):
    x = case[0]
    rows = Rows(x)
    values, ids = likeliest(rows, rows.maxima(), k)
    sorted_values, sorted_ids = torch.sort(x.float(), dim=-1, descending=True, stable=True)
    assert torch.equal(ids, sorted_ids[:, :k])
    assert torch.equal(values, sorted_values[:, :k])
    assert torch.equal(greedy(x)[0], sorted_ids[:, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 3, 64, 255, 256, 257, 1000, 4096])
def test_greedy_ties_take_the_lowest_id(dtype, vocab):
    rng = np.random.default_rng(vocab)
    for _ in range(20):
        x = torch.tensor(rng.integers(-3, 2, (4, vocab)), dtype=dtype)
        best = x.float().amax(-1)
        assert greedy(x)[0].tolist() == [
            row.tolist().index(m) for row, m in zip(x, best, strict=True)
        ]
        assert torch.equal(greedy(x)[1], best)
    assert greedy(torch.zeros(2, vocab, dtype=dtype))[0].tolist() == [0, 0]


def test_the_sort_is_what_the_words_say():
    rng = np.random.default_rng(1)
    for seed in range(200):
        x = rng.normal(size=50) * 3
        params = SamplingParams(
            temperature=float(rng.uniform(0.3, 2)),
            top_k=int(rng.integers(0, 50)),
            top_p=float(rng.uniform(0.05, 1)),
            min_p=float(rng.choice([0.0, rng.uniform(0, 0.5)])),
        )
        row = torch.tensor(x, dtype=torch.float32)[None]
        controls = Controls.of(batch_of([params], 50).sampling, np.arange(1), CPU)
        kept = by_sort(row, controls).keeps(row, torch.arange(50))[0].numpy()
        expected = probabilities(row[0].double().numpy(), params) > 0
        assert kept.astype(bool).tolist() == expected.tolist(), (seed, params)


def test_weights_are_whole_and_do_not_depend_on_the_place_of_a_logit():
    x = torch.randn(4, 3001, generator=torch.Generator().manual_seed(0)) * 6
    peak, heat = x.amax(-1, keepdim=True), torch.full((4, 1), 0.7)
    whole = weights(x, peak, heat, unit(3001))
    assert torch.equal(whole, whole.round()) and whole.amax() == unit(3001)
    assert whole.double().sum(-1).amax() < 2**52
    for start in range(40):
        for size in (1, 3, 16, 17, 500, 2900):
            part = weights(x[:, start : start + size], peak, heat, unit(3001))
            assert torch.equal(part, whole[:, start : start + size])


def kept_of(x, **kwargs):
    row = torch.tensor([x], dtype=torch.float32)
    controls = Controls.of(batch_of([SamplingParams(**kwargs)], len(x)).sampling, np.arange(1), CPU)
    keeps = by_sort(row, controls).keeps(row, torch.arange(len(x)))[0]
    return torch.nonzero(keeps)[:, 0].tolist()


def test_ties_at_the_boundary_are_cut_by_id():
    assert kept_of([1.0, 2.0, 2.0, 2.0], top_k=2) == [1, 2]
    assert kept_of([0.0] * 8, top_p=0.5) == [0, 1, 2, 3]
    assert kept_of([0.0] * 8, top_p=0.51) == [0, 1, 2, 3, 4]
    assert kept_of([0.0] * 8, top_k=4, top_p=0.5) == [0, 1]
    assert kept_of([0.0, 1.0, 1.0], min_p=1.0) == [1, 2]
    assert kept_of([3.0, 1.0, -5.0], top_p=1.0) == [0, 1, 2]
    assert kept_of([3.0, 1.0, -5.0], top_k=3) == [0, 1, 2]


def test_each_way_is_taken_and_gives_the_same_tokens(monkeypatch):
    """Rows for which 64 tokens, 512 tokens and a search are needed, with and without asking."""
    rng = np.random.default_rng(2)
    spread = np.repeat([6.0, 3.0, 1.6, 0.1], 8)
    x = torch.tensor(rng.normal(size=(32, 5000)) * spread[:, None], dtype=torch.float32)
    params = [SamplingParams(top_p=0.9)] * 24 + [SamplingParams(top_k=2000, top_p=0.9)] * 8
    sampling = batch_of(params, 5000, noise=noise_of(32)).sampling
    limited = Limited.of(Rows(x), np.arange(32), sampling)
    covered = [limited.look(k).covered.sum().item() for k in (64, 512)]
    assert 0 < covered[0] < covered[1] < 32
    expected = limited.draw()
    monkeypatch.setattr(Rows, "on_host", property(lambda self: False))
    assert torch.equal(Limited.of(Rows(x), np.arange(32), sampling).draw(), expected)
    boundary = by_sort(x, limited.controls)
    drawn = draw_from_all(limited.rows, limited.peak, limited.controls, boundary)
    assert torch.equal(drawn, expected)
