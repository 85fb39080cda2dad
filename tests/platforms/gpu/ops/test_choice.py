"""Choosing in a fixed number of launches, against the torch sampler."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.core.errors import UnsupportedError
from dovetail.core.request import SamplingParams
from dovetail.platforms.gpu.ops import choice
from dovetail.platforms.torch.sampling.weights import Controls
from tests.platforms.gpu.ops.devices import DEVICE
from tests.platforms.torch.fixed_cases import KINDS, LAST, choice_cases, controls_of, odd_rows
from tests.platforms.torch.sampling_cases import draw, logits_of, noise_of
from tests.thorough import diagonal, every, thorough

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in subtract")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FEW_KINDS = [KINDS[i] for i in (0, 1, 7, 10)]


def chosen(logits, params, noise):
    """By the kernels: tokens and which are finite, on the host."""
    controls = controls_of(params, logits.shape[1], noise)
    there = Controls(**{name: field.to(DEVICE) for name, field in vars(controls).items()})
    before = logits.clone()
    tokens, finite = choice.choose(logits.to(DEVICE), there)
    assert torch.equal(logits.nan_to_num(7.0), before.nan_to_num(7.0))
    assert tokens.dtype == torch.int64 and finite.dtype == torch.bool
    return tokens.cpu(), finite.cpu()


def agrees(logits, params, noise):
    expected = draw(logits, params, noise=noise)
    tokens, finite = chosen(logits, params, noise)
    assert torch.equal(finite, expected.finite)
    assert tokens.tolist() == expected.token_ids.tolist()


@pytest.fixture(autouse=True, scope="module")
def soiled():
    """Memory that is new holds anything: nothing may be read before it is written."""
    make = choice._State.of
    random = np.random.default_rng(0)

    def soiled(*args):
        state = make(*args)
        for tensor in vars(state).values():
            if tensor.dtype in (torch.int32, torch.int64):
                most = 1 << (30 if tensor.dtype == torch.int32 else 48)
                tensor.copy_(torch.from_numpy(random.integers(-most, most, tuple(tensor.shape))))
        return state

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(choice._State, "of", soiled)
        yield


@pytest.fixture
def small(monkeypatch):
    """Short lists, few blocks and small chunks: what large vocabularies meet, in small ones."""
    shrink(monkeypatch)


def shrink(patch):
    for name, value in {
        "_CHUNK": 128,
        "_BLOCK": 8,
        "_FEW": 6,
        "_SOME": 32,
        "_FEW_BLOCKS": 4,
        "_LIST": 32,
        "_TILE": 256,
        "_LIST_TILE": 32,
        "_PART": 256,
        "_ENOUGH": 12,
        "_MANY_PARTS": 8,
        "_ROUNDS": 3,
    }.items():
        patch.setattr(choice, name, value)


@pytest.mark.parametrize(("vocab", "dtype"), diagonal([1, 7, 1000], DTYPES))
def test_every_kind_of_row_gets_the_samplers_token(vocab, dtype):
    agrees(logits_of(len(KINDS), vocab, dtype=dtype), KINDS, noise_of(len(KINDS), seed=vocab))


@pytest.mark.parametrize("dtype", every(2, [torch.bfloat16, torch.float32]))
def test_a_large_vocabulary(dtype):
    x = logits_of(4, 50257, seed=5, dtype=dtype)
    agrees(x, FEW_KINDS, noise_of(4, seed=5))


@pytest.mark.parametrize("dtype", every(2, [torch.float32, torch.bfloat16]))
def test_lists_that_are_too_short(small, dtype):
    """Rows whose list overflows, or holds too little, or is enough."""
    kinds = [*KINDS[4:6], *KINDS[9:], SamplingParams(top_k=200), SamplingParams(min_p=1e-4)]
    agrees(logits_of(len(kinds), 700, seed=2, dtype=dtype), kinds, noise_of(len(kinds)))


def test_a_top_k_beyond_what_is_listed(small, monkeypatch):
    """The mass that top_p is a part of is then not known from the list."""
    monkeypatch.setattr(choice, "_LIST", 512)
    params = SamplingParams(temperature=3.0, top_k=350, top_p=0.4)
    agrees(logits_of(3, 700, seed=6, scale=1.0), [params] * 3, [0.5, 0.9, LAST])


def test_more_rounds_than_are_needed(small, monkeypatch):
    monkeypatch.setattr(choice, "_ROUNDS", 7)
    params = [SamplingParams(temperature=t, top_p=0.7) for t in (1.0, 3.0)] * 2
    x = logits_of(4, 400, seed=3, scale=1.0)
    x[2:] = (x[2:] * 4).round() / 4
    agrees(x, params, noise_of(4, seed=1))


def test_rows_are_settled_in_different_ways(small, monkeypatch):
    """By their list, by rounds that several programs share, by one program alone, and freely."""
    seen = []

    class Watched:
        def __init__(self, kernel):
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid):
            def launch(**arguments):
                seen.append(arguments["stage_ptr"].tolist())
                self.kernel[grid](**arguments)
                seen.append(arguments["stage_ptr"].tolist())

            return launch

    monkeypatch.setattr(choice, "search", Watched(choice.search))
    order = torch.from_numpy(np.random.default_rng(0).permutation(700)).float()[None]
    peaked, even = order / 2, order / 500
    params = [SamplingParams(top_p=0.9), SamplingParams(top_p=0.9), SamplingParams(top_k=90)]
    agrees(torch.cat((peaked, even, even, even)), [*params, SamplingParams()], [0.4] * 4)
    assert seen == [[0, 3, 3, 1], [0, 4, 4, 1]]


@settings(max_examples=12, deadline=None)
@given(choice_cases(st, (1, 2, 5, 63, 65, 200, 700)))
def test_random_rows_with_ties_and_any_controls(case):
    agrees(*case)


@thorough
@settings(max_examples=12, deadline=None)
@given(case=choice_cases(st, (65, 200, 700)))
def test_random_rows_of_a_vocabulary_that_is_large_for_its_lists(case):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        agrees(*case)


@pytest.mark.parametrize(("params", "dtype"), diagonal(FEW_KINDS, [torch.float32, torch.bfloat16]))
def test_rows_that_are_not_finite_say_so(params, dtype):
    rows = odd_rows(300, dtype)
    agrees(rows, [params] * len(rows), [0.5] * len(rows))


def test_flat_rows_and_huge_peaks(small):
    most = torch.finfo(torch.float32).max
    x = torch.zeros(3, 500)
    x[1, 77], x[2, 77], x[2, 78] = 1e4, most, -most
    for params in (SamplingParams(top_p=0.5), SamplingParams(top_k=77), SamplingParams()):
        agrees(x, [params] * 3, [LAST] * 3)
    tokens, _ = chosen(x, [SamplingParams(top_p=0.5)] * 3, [LAST] * 3)
    assert tokens.tolist() == [249, 77, 77]


def test_shares_are_exact_to_the_last_unit():
    """Half of two equal weights and one unit more is not reached by one of the two."""
    x = torch.tensor([[0.0, 0.0, -34.6], [0.0, 0.0, -99.0]])
    agrees(x, [SamplingParams(top_p=0.5)] * 2, [LAST] * 2)
    tokens, _ = chosen(x, [SamplingParams(top_p=0.5)] * 2, [LAST] * 2)
    assert tokens.tolist() == [1, 0]
    agrees(x, [SamplingParams()] * 2, [1.0] * 2)


def test_a_row_does_not_depend_on_the_others(small):
    kinds = [KINDS[i] for i in (0, 1, 5, 6, 10, 11)]
    x, noise = logits_of(len(kinds), 650, seed=9), noise_of(len(kinds), seed=9)
    whole, _ = chosen(x, kinds, noise)
    order = np.random.default_rng(0).permutation(len(kinds))
    shuffled, _ = chosen(x[order], [kinds[i] for i in order], noise[order])
    assert torch.equal(shuffled, whole[order])
    for i in (2, 5):
        alone, _ = chosen(x[i : i + 1], kinds[i : i + 1], noise[i : i + 1])
        assert alone[0] == whole[i]


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_all_rows_are_known_to_be_greedy(dtype):
    for rows in (
        odd_rows(300, dtype),
        logits_of(3, 2500, dtype=dtype),
        torch.zeros(2, 9, dtype=dtype),
    ):
        tokens, finite = choice.choose(rows.to(DEVICE), None)
        greedy = [SamplingParams(temperature=0.0)] * len(rows)
        expected = draw(rows, greedy)
        assert tokens.tolist() == expected.token_ids.tolist()
        assert torch.equal(finite.cpu(), expected.finite)


def test_where_no_row_is_known_to_restrict_anything(monkeypatch):
    x, noise = logits_of(3, 3000, seed=4), noise_of(3, seed=4)
    expected = draw(x, KINDS[:3], noise=noise)
    controls = controls_of(KINDS[:3], 3000, noise)
    there = Controls(**{name: field.to(DEVICE) for name, field in vars(controls).items()})
    monkeypatch.setattr(choice, "settle", None)
    tokens, finite = choice.choose(x.to(DEVICE), there, restricts=False)
    assert tokens.tolist() == expected.token_ids.tolist() and finite.all()


def test_the_coldest_temperature_that_draws():
    params = [SamplingParams(temperature=t) for t in (1e-5, 9.9e-6)]
    agrees(torch.zeros(2, 9), params, [LAST] * 2)
    assert chosen(torch.zeros(2, 9), params, [LAST] * 2)[0].tolist() == [8, 0]


def test_other_dtypes_are_refused():
    with pytest.raises(UnsupportedError, match=r"not torch\.float64"):
        choice.choose(torch.zeros(1, 9, dtype=torch.float64), None)


def test_rows_may_lie_apart():
    wide = logits_of(4, 400)
    agrees(wide[:, :300], FEW_KINDS, noise_of(4))
    agrees(logits_of(300, 4).t(), FEW_KINDS, noise_of(4))


def test_no_rows():
    tokens, finite = chosen(torch.zeros(0, 9), [], [])
    assert tokens.shape == finite.shape == (0,)
