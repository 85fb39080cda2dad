"""Checking drafts: the distribution stays what it is, and rules see only what was accepted."""

import dataclasses

import numpy as np
import pytest
import torch

from dovetail.core.request import SamplingParams
from dovetail.core.sampling.noise import uniform
from dovetail.platforms.torch.sampler import Sampler
from tests.platforms.torch.sampling_cases import CPU, batch_of, joined, logits_of, probabilities


def drafted(params, vocab, drafts, noise, num_generated, num_logprobs=None):
    """A step of rows whose last known token is 0, followed by their drafts."""
    counts = np.array([len(d) for d in drafts], np.int32)
    places = counts + 1
    each = [p for p, n in zip(params, places, strict=True) for _ in range(n)]
    base = batch_of(
        each, vocab, noise=noise, num_generated=num_generated, num_logprobs=num_logprobs
    )
    return dataclasses.replace(
        base,
        rows=np.arange(len(params), dtype=np.int32),
        query_lens=places,
        context_lens=np.ones(len(params), np.int32),
        token_ids=np.array([t for d in drafts for t in (0, *d)], np.int32),
        sampled=np.arange(len(params), dtype=np.int32),
        num_drafts=counts,
    )


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_p=0.9),
        SamplingParams(temperature=1.2, top_k=6),
    ],
)
def test_twenty_thousand_checked_drafts_follow_the_distribution(params):
    """Rejection sampling keeps the distribution: chi-square over the first token of each row."""
    vocab, count = 16, 20_000
    logits = logits_of(1, vocab, seed=3, scale=1.5)
    guesses = np.random.default_rng(1).integers(0, vocab, count)
    sampler = Sampler(vocab, count, CPU)
    noise = uniform(np.arange(2 * count, dtype=np.uint64), np.zeros(2 * count, np.int64))
    batch = drafted([params] * count, vocab, [[g] for g in guesses], noise, np.zeros(2 * count))
    result = sampler.sample(logits.expand(2 * count, -1), batch)
    first = result.chosen[:, 0].numpy()
    p = probabilities(logits[0].double().numpy(), params)
    seen = np.bincount(first, minlength=vocab)
    assert not seen[p == 0].any()
    kept = p > 0
    chi_square = (((seen - count * p) ** 2)[kept] / (count * p[kept])).sum()
    assert chi_square < 45, "far beyond the 99.99th percentile of 15 degrees of freedom"
    accepted = (result.num_tokens == 2).numpy()
    assert (accepted == (first == guesses)).all()
    share = accepted.sum() / p[guesses].sum()
    assert 0.9 < share < 1.1, "a draft is accepted with its own probability"


def test_what_follows_the_first_wrong_draft_is_void():
    vocab = 50
    logits = logits_of(9, vocab, seed=5)
    best = logits.argmax(-1).tolist()
    drafts = [[best[0], best[1]], [best[3], (best[4] + 1) % vocab, best[5]], []]
    params = [SamplingParams(temperature=0.0)] * 3
    sampler = Sampler(vocab, 8, CPU)
    batch = drafted(params, vocab, drafts, np.zeros(8), np.zeros(8), num_logprobs=1)
    result = sampler.sample(logits[:8], batch)
    assert result.num_tokens.tolist() == [3, 2, 1]
    assert result.chosen[0, :3].tolist() == best[:3]
    assert result.chosen[1, :2].tolist() == best[3:5]
    assert result.chosen[2, :1].tolist() == best[7:8]
    assert result.token_ids.tolist() == [best[2], best[4], best[7]]
    assert result.logprobs.token_ids[:, 0].tolist() == best[:8]


RULES = [
    SamplingParams(temperature=0.0, repetition_penalty=1.8),
    SamplingParams(temperature=0.9, frequency_penalty=1.5, presence_penalty=0.5),
    SamplingParams(temperature=1.0, min_tokens=3, max_tokens=9),
    SamplingParams(temperature=0.8),
    SamplingParams(temperature=0.0, logit_bias={4: 3.0}, presence_penalty=2.0),
]


@pytest.mark.parametrize("right", [0, 1, 2, 4])
def test_rules_give_the_tokens_that_they_give_one_at_a_time(right):
    vocab, length, rounds = 24, 4, 3
    table = logits_of(len(RULES) * length * (rounds + 2), vocab, seed=7, scale=1.0)
    by_row = table.view(len(RULES), -1, vocab)

    def noise(row, position):
        return float(uniform(np.array([row], np.uint64), np.array([position]))[0])

    def fresh():
        sampler = Sampler(vocab, 8, CPU)
        sampler.join([joined(i, p, (1, 2), (), (3,)) for i, p in enumerate(RULES)])
        return sampler

    slow, told = fresh(), [[] for _ in RULES]
    for position in range(length * rounds):
        numbers = np.full(len(RULES), position)
        noises = [noise(row, position) for row in range(len(RULES))]
        batch = batch_of(RULES, vocab, noise=noises, num_generated=numbers)
        for row, token in enumerate(slow.sample(by_row[:, position], batch).token_ids.tolist()):
            told[row].append(token)
    fast, got = fresh(), [[] for _ in RULES]
    while min(len(tokens) for tokens in got) < length * rounds - length - 1:
        drafts = []
        for row, tokens in enumerate(got):
            known = told[row][len(tokens) : len(tokens) + length]
            wrong = [(t + 1) % vocab for t in known[right:]]
            drafts.append([*known[:right], *wrong])
        positions = [
            len(t) + k for t, d in zip(got, drafts, strict=True) for k in range(len(d) + 1)
        ]
        rows = [row for row, d in enumerate(drafts) for _ in range(len(d) + 1)]
        noises = [noise(r, p) for r, p in zip(rows, positions, strict=True)]
        logits = torch.stack([by_row[r, p] for r, p in zip(rows, positions, strict=True)])
        result = fast.sample(logits, drafted(RULES, vocab, drafts, noises, positions))
        for row, tokens in enumerate(got):
            tokens += result.chosen[row, : int(result.num_tokens[row])].tolist()
        assert (result.num_tokens == right + 1).all()
    for tokens, want in zip(got, told, strict=True):
        assert tokens == want[: len(tokens)]


def test_a_place_that_is_not_finite_matters_only_where_it_is_reached():
    vocab = 20
    logits = logits_of(6, vocab, seed=2)
    best = logits.argmax(-1).tolist()
    logits[1, 3] = torch.nan
    logits[4, 3] = torch.nan
    params = [SamplingParams(temperature=0.0)] * 2
    drafts = [[best[0], 1], [(best[3] + 1) % vocab, 1]]
    batch = drafted(params, vocab, drafts, np.zeros(6), np.zeros(6))
    result = Sampler(vocab, 4, CPU).sample(logits, batch)
    assert result.finite.tolist() == [False, True]
    assert result.num_tokens[1] == 1
