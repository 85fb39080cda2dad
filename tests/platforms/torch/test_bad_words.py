"""Bad words on the device against a slow reference on the host."""

import numpy as np
import pytest
import torch

from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.sampler import Sampler
from tests.platforms.torch.sampling_cases import (
    CPU,
    batch_of,
    draw,
    joined,
    logits_of,
    noise_of,
    probabilities,
)

VOCAB = 11


def forbidden(words, output):
    """The last token of each word whose other tokens are the end of the output."""
    found = set()
    for *head, last in words:
        if not head or list(output)[-len(head) :] == head:
            found.add(last)
    return found


def words_of(rng):
    return [
        [int(t) for t in rng.integers(0, VOCAB, rng.integers(1, 5))]
        for _ in range(rng.integers(1, 30))
    ]


def chosen(logits, params, output, noise):
    x = logits.double().numpy().copy()
    x[sorted(forbidden(params.bad_words_token_ids, output))] = -np.inf
    if params.is_greedy:
        return int(x.argmax())
    p = probabilities(x, params)
    return int((np.cumsum(p) > noise * p.sum()).argmax())


def some_params(rng):
    """Two single-token words at most, so that something is left to say."""
    words = words_of(rng)
    single = [w for w in words if len(w) == 1][:2]
    several = [w for w in words if len(w) > 1]
    temperature = float(rng.choice([0.0, 1.0]))
    return SamplingParams(bad_words_token_ids=several + single, temperature=temperature)


@pytest.mark.parametrize("seed", range(6))
def test_a_long_output_keeps_to_the_words_without_the_host_looking(seed):
    """As one step ahead: tokens are read when all steps are over, and rows come and go."""
    rng = np.random.default_rng(seed)
    params = [some_params(rng) for _ in range(5)] + [SamplingParams(temperature=0.0)]
    rows = len(params)
    noise = noise_of(rows * 40, seed).reshape(40, rows)
    logits = [logits_of(rows, VOCAB, seed=seed * 100 + step) for step in range(40)]
    sampler = Sampler(VOCAB, rows, CPU)
    sampler.join([joined(i, p) for i, p in enumerate(params)])
    steps = []
    for step in range(40):
        if step == 17:
            so_far = torch.stack(steps).T.tolist()
            sampler.join([joined(i, p, output=so_far[i]) for i, p in enumerate(params)])
        batch = batch_of(params, VOCAB, noise=noise[step], num_generated=[step] * rows)
        steps.append(sampler.sample(logits[step], batch).token_ids)
    outputs = torch.stack(steps).T.tolist()
    changed = 0
    for i, p in enumerate(params):
        for step in range(40):
            said = outputs[i][:step]
            want = chosen(logits[step][i], p, said, float(noise[step, i]))
            assert outputs[i][step] == want, (i, step)
            changed += bool(forbidden(p.bad_words_token_ids, said))
    assert changed > 50


def test_neighbours_are_untouched_bit_for_bit():
    params = [SamplingParams(bad_words_token_ids=[[3], [4, 5]]), SamplingParams(), SamplingParams()]
    logits = logits_of(3, VOCAB)
    with_words = draw(logits, params, noise=noise_of(3))
    without = draw(logits, [SamplingParams()] * 3, noise=noise_of(3))
    assert torch.equal(with_words.token_ids[1:], without.token_ids[1:])


@pytest.mark.parametrize(
    ("words", "output", "gone"),
    [
        ([[7]], [], {7}),
        ([[1, 7]], [], set()),
        ([[1, 7]], [1], {7}),
        ([[1, 7]], [1, 2], set()),
        ([[1, 2, 7], [2, 8]], [1, 2], {7, 8}),
        ([[1, 2, 7]], [2], set()),
        ([[7], [7], [1, 7]], [1], {7}),
        ([[99], [1, 99], [99, 1], [5]], [1], {5}),
    ],
)
def test_which_tokens_are_forbidden(words, output, gone):
    """Tokens outside the vocabulary can never be said; the prompt is no part of the output."""
    params = SamplingParams(bad_words_token_ids=words, temperature=0.0)
    for token in range(VOCAB):
        logits = torch.zeros(1, VOCAB)
        logits[0, token] = 5.0
        result = draw(logits, [params], prompts=[(1, 2, 1)], outputs=[tuple(output)])
        assert (int(result.token_ids[0]) != token) == (token in gone)


def test_a_row_without_anything_left_fails():
    params = SamplingParams(bad_words_token_ids=[[t] for t in range(VOCAB)], temperature=0.0)
    assert not draw(torch.zeros(1, VOCAB), [params]).finite.any()
