"""Choosing with fixed shapes, against the sampler that sorts rows by kind."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.core.batch import SamplingBatch
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.sampling import fixed
from dovetail.platforms.torch.sampling.fixed import choose_fixed
from dovetail.platforms.torch.sampling.rows import Rows
from dovetail.platforms.torch.sampling.weights import Controls
from tests.platforms.torch.fixed_cases import KINDS, choice_cases, controls_of, odd_rows
from tests.platforms.torch.sampling_cases import CPU, batch_of, draw, logits_of, noise_of

LAST = 1 - 2.0**-24


def agrees(logits, params, noise):
    expected = draw(logits, params, noise=noise)
    before = logits.clone()
    tokens, finite = choose_fixed(logits, controls_of(params, logits.shape[1], noise))
    assert tokens.dtype == torch.int64 and finite.dtype == torch.bool
    assert torch.equal(finite, expected.finite)
    assert torch.equal(tokens, expected.token_ids)
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 7, 1000, 50257])
def test_every_kind_of_row_gets_the_samplers_token(vocab, dtype):
    noise = noise_of(len(KINDS), seed=vocab)
    agrees(logits_of(len(KINDS), vocab, dtype=dtype), KINDS, noise)


@settings(max_examples=200, deadline=None)
@given(choice_cases(st))
def test_random_rows_with_ties_and_any_controls(case):
    agrees(*case)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("params", KINDS)
def test_rows_that_are_not_finite_say_so(params, dtype):
    rows = odd_rows(300, dtype)
    agrees(rows, [params] * len(rows), [0.5] * len(rows))


def test_a_row_does_not_depend_on_the_others():
    x, noise = logits_of(len(KINDS), 3001), noise_of(len(KINDS))
    whole, _ = choose_fixed(x, controls_of(KINDS, 3001, noise))
    for i, params in enumerate(KINDS):
        alone, _ = choose_fixed(x[i : i + 1], controls_of([params], 3001, noise[i : i + 1]))
        assert alone[0] == whole[i]


def test_nothing_is_looked_at(monkeypatch):
    """No value of a tensor reaches the host: reading one is the only way to stop a queue."""

    def looked(*_):
        raise AssertionError("a value was read on the host")

    monkeypatch.setattr(Rows, "on_host", property(lambda self: False))
    x, controls = logits_of(len(KINDS), 1000), controls_of(KINDS, 1000, noise_of(len(KINDS)))
    expected, _ = choose_fixed(x, controls)
    for name in (
        "item",
        "tolist",
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "nonzero",
        "numpy",
        "cpu",
    ):
        monkeypatch.setattr(torch.Tensor, name, looked)
    tokens, _ = choose_fixed(x, controls)
    monkeypatch.undo()
    assert torch.equal(tokens, expected)


def test_controls_are_packed_into_one_table():
    params = [SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.25), SamplingParams()]
    batch = batch_of(params, 50, noise=[0.25, LAST]).sampling
    table = Controls.pack(batch, 4)
    assert table.dtype == np.float32 and table.shape == (5, 4)
    assert np.array_equal(table[:, :2], Controls.pack(batch))
    controls = Controls.unpack(torch.from_numpy(table))
    assert controls.temperature[:, 0].tolist() == [0.5, 1.0, 0.0, 0.0]
    assert controls.floor[:2, 0].tolist() == [np.float32(np.log(0.25)), -np.inf]
    assert controls.top_k[:2, 0].tolist() == [3, 50]
    assert controls.top_p[:2, 0].tolist() == [np.float32(0.9), 1.0]
    assert controls.uniform[:2, 0].tolist() == [0.25, LAST]
    same = Controls.of(batch, np.arange(2), CPU)
    assert torch.equal(same.take(slice(1)).floor, controls.floor[:1])
    tokens, finite = choose_fixed(torch.zeros(4, 50).fill_diagonal_(1.0), controls)
    assert tokens[2:].tolist() == [2, 3] and finite.all()


def test_a_greedy_batch_needs_no_controls_of_its_own():
    x = logits_of(3, 97)
    controls = Controls.unpack(torch.from_numpy(Controls.pack(SamplingBatch.greedy(3))))
    assert torch.equal(choose_fixed(x, controls)[0], x.argmax(-1))
    for dtype in (torch.float32, torch.bfloat16):
        rows = odd_rows(300, dtype)
        controls = Controls.unpack(torch.from_numpy(Controls.pack(SamplingBatch.greedy(8))))
        for ours, theirs in zip(
            choose_fixed(rows, None), choose_fixed(rows, controls), strict=True
        ):
            assert torch.equal(ours, theirs)


def test_rows_that_restrict_nothing_need_no_search(monkeypatch):
    x, noise = logits_of(3, 3001), noise_of(3)
    controls = controls_of(KINDS[:3], 3001, noise)
    expected, _ = choose_fixed(x, controls)
    monkeypatch.setattr(fixed, "by_search", None)
    assert torch.equal(choose_fixed(x, controls, restricts=False)[0], expected)


def test_the_coldest_temperature_that_draws():
    params = [SamplingParams(temperature=t) for t in (1e-5, 9.9e-6)]
    agrees(torch.zeros(2, 9), params, [LAST] * 2)
    assert choose_fixed(torch.zeros(2, 9), controls_of(params, 9, [LAST] * 2))[0].tolist() == [8, 0]
