import numpy as np
import pytest
import torch

from dovetail.core.request import SamplingParams
from dovetail.core.sampling.noise import uniform
from dovetail.platforms.torch.sampler import Sampler
from dovetail.platforms.torch.sampling.choice import choose
from dovetail.platforms.torch.sampling.rows import Rows
from tests.platforms.torch.sampling_cases import (
    CPU,
    all_params,
    batch_of,
    draw,
    joined,
    logits_of,
    noise_of,
    probabilities,
    shaped,
)

LAST = 1 - 2.0**-24


def inverted(p, u):
    """The first token in vocabulary order at which the cumulative probability exceeds u."""
    return int((np.cumsum(p) > u * p.sum()).argmax())


# What is drawn


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_where_the_oracles_cumulative_distribution_exceeds_the_noise(dtype):
    rng = np.random.default_rng(3)
    params = [p for p in all_params() for _ in range(40)]
    noise = noise_of(len(params), seed=5)
    logits = logits_of(len(params), 97, dtype=dtype)
    prompts = [tuple(rng.integers(0, 97, 6).tolist()) for _ in params]
    outputs = [tuple(rng.integers(0, 97, rng.integers(0, 7)).tolist()) for _ in params]
    stops = [(1, 2, 40)] * len(params)
    result = draw(
        logits,
        params,
        noise=noise,
        prompts=prompts,
        outputs=outputs,
        stops=stops,
        max_rows=len(params),
    )
    assert result.finite.all() and result.token_ids.dtype == torch.int64
    rows = logits.double().numpy()
    for i, p in enumerate(params):
        x = shaped(rows[i], p, prompts[i], outputs[i], stops[i])
        if p.is_greedy:
            expected = int(x.argmax())
        else:
            expected = inverted(probabilities(x, p), float(noise[i]))
        assert result.token_ids[i] == expected, (i, p)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 7},
        {"top_p": 0.8},
        {"min_p": 0.15},
        {"temperature": 1.4, "min_p": 0.05, "top_k": 15, "top_p": 0.9},
    ],
)
def test_twenty_thousand_draws_follow_the_distribution(kwargs):
    params, vocab, count = SamplingParams(**kwargs), 60, 20_000
    row = logits_of(1, vocab, seed=4, scale=1.5)
    who = np.arange(count, dtype=np.uint64)
    result = draw(row.expand(count, -1), [params] * count, noise=uniform(who, np.full(count, 17)))
    p = probabilities(row[0].double().numpy(), params)
    counts = np.bincount(result.token_ids.numpy(), minlength=vocab)
    assert (counts[p == 0] == 0).all()
    expected = p[p > 0] * count
    chi = ((counts[p > 0] - expected) ** 2 / expected).sum()
    free = (p > 0).sum() - 1
    assert chi < free + 5 * np.sqrt(2 * free)


@pytest.mark.parametrize("kwargs", [{}, {"top_p": 0.9}, {"top_k": 30}, {"top_p": 0.99999}])
@pytest.mark.parametrize("vocab", [1, 5, 64, 700, 3000])
def test_never_a_token_of_probability_zero(kwargs, vocab):
    logits = torch.full((4, vocab), -torch.inf)
    logits[0, vocab // 2] = 1.0
    logits[1, 0] = 1.0
    logits[2, -1] = 1.0
    logits[3, ::2] = -60.0
    logits[3, 0] = 1.0
    params = [SamplingParams(**kwargs)] * 4
    for u in (0.0, 0.5, LAST):
        result = draw(logits, params, noise=[u] * 4)
        assert result.token_ids.tolist() == [vocab // 2, 0, vocab - 1, 0]
        assert result.finite.all()


def test_noise_near_one_takes_the_last_token_and_zero_the_first():
    logits = torch.zeros(1, 300)
    params = [SamplingParams()]
    assert draw(logits, params, noise=[LAST]).token_ids.tolist() == [299]
    assert draw(logits, params, noise=[0.0]).token_ids.tolist() == [0]
    logits[0, [0, 299]] = -torch.inf
    assert draw(logits, params, noise=[LAST]).token_ids.tolist() == [298]
    assert draw(logits, params, noise=[0.0]).token_ids.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extremes_do_not_overflow(dtype):
    huge = torch.finfo(dtype).max
    logits = torch.tensor([[0.0, huge, -huge, huge / 2]] * 6, dtype=dtype)
    params = [
        SamplingParams(temperature=1e-5),
        SamplingParams(temperature=1e-5, top_p=0.5),
        SamplingParams(temperature=100.0, top_k=2),
        SamplingParams(temperature=1e-5, min_p=0.5, seed=1),
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.01, presence_penalty=2.0),
    ]
    result = draw(logits, params, noise=[LAST] * 6)
    assert result.finite.all()
    assert result.token_ids.tolist() == [1] * 6
    close = torch.tensor([[1.0, 1.0 + 2.0**-6]] * 4, dtype=dtype)
    cold = [SamplingParams(temperature=1e-5 * 2**i) for i in range(4)]
    assert draw(close, cold, noise=[0.0] * 4).token_ids.tolist() == [1] * 4


# Rows are independent


@pytest.mark.parametrize("vocab", [97, 1000, 33_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_draws_the_same_alone_in_any_batch_and_order(vocab, dtype):
    rng = np.random.default_rng(8)
    params = all_params() * 2
    count = len(params)
    logits, noise = logits_of(count, vocab, scale=2.0, dtype=dtype), noise_of(count, seed=2)
    prompts = [tuple(rng.integers(0, 97, 5).tolist()) for _ in params]
    outputs = [tuple(rng.integers(0, 97, i % 4).tolist()) for i in range(count)]

    def tokens(which):
        result = draw(
            logits[list(which)],
            [params[i] for i in which],
            noise=noise[list(which)],
            prompts=[prompts[i] for i in which],
            outputs=[outputs[i] for i in which],
        )
        return result.token_ids.tolist()

    whole = tokens(range(count))
    assert [tokens([i])[0] for i in range(count)] == whole
    for _ in range(4):
        some = rng.permutation(count)[: rng.integers(2, count + 1)]
        assert tokens(some) == [whole[i] for i in some]


def test_logprobs_and_tokens_do_not_depend_on_threads():
    logits, noise = logits_of(8, 70_000, scale=1.0), noise_of(8)
    params = [SamplingParams(), SamplingParams(top_p=0.9)] * 4
    sampler, before, found = Sampler(70_000, 8, CPU), torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = sampler.sample(logits, batch_of(params, 70_000, noise=noise, num_logprobs=5))
        found.append(result)
    torch.set_num_threads(before)
    for result in found[1:]:
        assert torch.equal(result.token_ids, found[0].token_ids)
        assert torch.equal(result.logprobs.logprobs, found[0].logprobs.logprobs)


def test_greedy_rows_among_others_take_the_lowest_of_equal_logits():
    logits = torch.zeros(3, 500)
    params = [SamplingParams(temperature=0.0), SamplingParams(), SamplingParams(top_k=1)]
    assert draw(logits, params, noise=[LAST] * 3).token_ids.tolist() == [0, 499, 0]
    logits[:, 77] = logits[:, 333] = 1.0
    found = draw(logits, params, noise=[LAST] * 3).token_ids.tolist()
    assert found[0] == found[2] == 77


# Rows with state


def conversation(params, steps, resume_at=None, vocab=40):
    """Tokens of several steps, each counted on the device; possibly resumed from the host's."""
    sampler, prompt, tokens = Sampler(vocab, 4, CPU), (1, 2, 2, 3), []
    sampler.join([joined(2, params, prompt, stops=(5,))])
    for step in range(steps):
        if step == resume_at:
            sampler = Sampler(vocab, 4, CPU)
            sampler.join([joined(1, params, prompt, tokens, stops=(5,))])
        row = 1 if resume_at is not None and step >= resume_at else 2
        batch = batch_of(
            [params],
            vocab,
            rows=[row],
            num_generated=[step],
            noise=uniform(np.array([9], np.uint64), np.array([step])),
        )
        logits = logits_of(1, vocab, seed=step // 2, scale=1.0)
        tokens.append(int(sampler.sample(logits, batch).token_ids[0]))
    return tokens


PENALISED = [
    SamplingParams(repetition_penalty=1.8),
    SamplingParams(frequency_penalty=1.5, temperature=0.0),
    SamplingParams(presence_penalty=1.2, top_p=0.8),
    SamplingParams(
        repetition_penalty=0.8, frequency_penalty=-0.5, presence_penalty=0.3, logit_bias={4: 2.0}
    ),
    SamplingParams(min_tokens=6, max_tokens=20, temperature=0.0, logit_bias={5: 50.0}),
]


@pytest.mark.parametrize("params", PENALISED)
def test_each_step_counts_what_was_drawn_before(params):
    vocab, tokens = 40, conversation(params, 12)
    for step, token in enumerate(tokens):
        logits = logits_of(1, vocab, seed=step // 2, scale=1.0)[0].double().numpy()
        x = shaped(logits, params, (1, 2, 2, 3), tuple(tokens[:step]), (5,))
        u = float(uniform(np.array([9], np.uint64), np.array([step]))[0])
        greedy = params.is_greedy
        assert token == (int(x.argmax()) if greedy else inverted(probabilities(x, params), u))


@pytest.mark.parametrize("params", PENALISED)
@pytest.mark.parametrize("at", [1, 5, 11])
def test_a_resumed_row_goes_on_as_if_nothing_had_happened(params, at):
    assert conversation(params, 12, resume_at=at) == conversation(params, 12)


def test_long_outputs_outgrow_the_first_room():
    params = SamplingParams(frequency_penalty=2.0, temperature=0.0)
    sampler, vocab = Sampler(50, 2, CPU), 50
    sampler.join([joined(0, params, prompt=range(30)), joined(1, params, prompt=(7,))])
    logits = torch.zeros(2, vocab)
    for step in range(700):
        batch = batch_of([params] * 2, vocab, num_generated=[step] * 2)
        assert sampler.sample(logits, batch).token_ids.tolist() == [step % vocab] * 2


def test_state_is_kept_only_for_rows_that_need_it_and_dropped_with_them():
    sampler = Sampler(100, 4, CPU)
    plain, strong = SamplingParams(temperature=0.0), SamplingParams(logit_bias={5: 99.0})
    rules = sampler._shaper._rules
    sampler.join([joined(0, plain), joined(1, SamplingParams(top_p=0.5, temperature=0.3))])
    assert not rules
    sampler.join([joined(1, strong), joined(2, SamplingParams(presence_penalty=1.0))])
    assert sorted(rules) == [1, 2] and sorted(sampler._shaper._penalties._slots) == [2]
    for _ in range(20):
        sampler.join([joined(2, SamplingParams(presence_penalty=1.0))])
    assert len(sampler._shaper._penalties._free) == 3
    sampler.join([joined(1, plain), joined(2, plain)])
    assert not rules and len(sampler._shaper._penalties._free) == 4
    logits = torch.zeros(2, 100)
    batch = batch_of([plain, strong], 100, rows=[1, 3])
    assert sampler.sample(logits, batch).token_ids[0] == 0


def test_min_tokens_forbids_stops_until_enough_were_generated():
    params = SamplingParams(min_tokens=3, max_tokens=9, temperature=0.0)
    sampler = Sampler(10, 1, CPU)
    sampler.join([joined(0, params, stops=(4, 6))])
    logits = torch.arange(10.0)[None] * 0
    logits[0, 4], logits[0, 6], logits[0, 9] = 9.0, 8.0, 7.0
    drawn = [
        sampler.sample(logits, batch_of([params], 10, num_generated=[n])).token_ids.item()
        for n in range(5)
    ]
    assert drawn == [9, 9, 9, 4, 4]


def test_ids_outside_the_vocabulary_are_left_out():
    params = [
        SamplingParams(allowed_token_ids=[3, 1000], temperature=0.0),
        SamplingParams(logit_bias={1000: 50.0, 2: 1.0}, temperature=0.0),
    ]
    assert draw(torch.zeros(2, 10), params).token_ids.tolist() == [3, 2]


def test_logits_are_not_changed():
    params = all_params()
    logits = logits_of(len(params), 200)
    before = logits.clone()
    draw(logits, params, noise=noise_of(len(params)))
    assert torch.equal(logits, before)


# Rows that fail


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [70, 1000])
def test_a_row_that_is_not_finite_fails_alone(bad, dtype, vocab):
    for params in all_params():
        logits = logits_of(5, vocab, dtype=dtype)
        fine = draw(logits, [params] * 5, noise=noise_of(5), stops=[(1,)] * 5).token_ids
        logits[1, 0] = bad
        logits[2, vocab - 1] = bad
        logits[3] = -torch.inf
        logits[4, 1] = bad
        logits[4, 2] = -torch.inf
        result = draw(logits, [params] * 5, noise=noise_of(5), stops=[(1,)] * 5)
        assert result.finite.tolist() == [True, False, False, False, False], params
        assert result.token_ids.tolist() == [fine[0], 0, 0, 0, 0]


def test_minus_infinity_alone_is_allowed():
    logits = torch.full((1, 300), -torch.inf)
    logits[0, 123] = -5.0
    for params in all_params()[:8]:
        result = draw(logits, [params], noise=[0.9])
        assert result.finite.all() and result.token_ids.tolist() == [123]


def test_a_row_with_nothing_left_to_choose_fails():
    params = [
        SamplingParams(allowed_token_ids=[1000]),
        SamplingParams(allowed_token_ids=[4], min_tokens=2, max_tokens=3, temperature=0.0),
        SamplingParams(allowed_token_ids=[4], min_tokens=2, max_tokens=3, top_p=0.5),
        SamplingParams(allowed_token_ids=[4, 5], min_tokens=2, max_tokens=3, top_p=0.5),
    ]
    result = draw(torch.zeros(4, 20), params, stops=[(4,)] * 4)
    assert result.finite.tolist() == [False, False, False, True]
    assert result.token_ids.tolist() == [0, 0, 0, 5]


# What a platform may put in


def test_a_platforms_own_choice_is_used_for_rows_of_every_kind():
    calls = []

    def own(rows, which, sampling):
        calls.append(which.tolist())
        tokens, finite = choose(rows, which, sampling)
        return (tokens + 1) % rows.vocab_size, finite

    params = [p for p in all_params() if not p.shapes_logits]
    params.append(SamplingParams(logit_bias={3: 5.0}, temperature=0.0))
    logits, noise = logits_of(len(params), 500), noise_of(len(params))
    sampler = Sampler(500, 16, CPU, own)
    sampler.join([joined(i, p) for i, p in enumerate(params)])
    got = sampler.sample(logits, batch_of(params, 500, noise=noise)).token_ids
    assert torch.equal(got, (draw(logits, params, noise=noise).token_ids + 1) % 500)
    last = len(params) - 1
    assert calls == [list(range(last)), [last]]


def test_a_device_that_cannot_be_asked_gives_the_same_tokens(monkeypatch):
    params = all_params()
    logits = logits_of(len(params), 3000, scale=1.0)
    noise = noise_of(len(params))
    expected = draw(logits, params, noise=noise).token_ids
    monkeypatch.setattr(Rows, "on_host", property(lambda self: False))
    assert torch.equal(draw(logits, params, noise=noise).token_ids, expected)
