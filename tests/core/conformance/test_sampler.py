"""The kit's sampler against torch's, token for token."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from dovetail.core.conformance.sampler import choose, log_softmax
from dovetail.core.request import SamplingParams
from dovetail.core.sampling.noise import uniform
from tests.platforms.torch.sampling_cases import draw

VOCAB = 300
CASES: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.3},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 1.7, "top_k": 12},
    {"temperature": 1.7, "top_p": 0.6},
    {"temperature": 1.7, "min_p": 0.2},
    {"temperature": 1.7, "min_p": 0.05, "top_k": 30, "top_p": 0.9},
    {"temperature": 0.0, "logit_bias": {4: 9.0, 7: -100.0}},
    {"temperature": 1.0, "allowed_token_ids": [4, 9, 200]},
    {"temperature": 1.0, "repetition_penalty": 1.9, "frequency_penalty": 0.7},
    {"temperature": 0.0, "presence_penalty": 2.0, "repetition_penalty": 0.2},
    {"temperature": 0.0, "min_tokens": 9, "max_tokens": 20},
    {"temperature": 0.0, "bad_words_token_ids": [[5], [40, 41], [9, 9, 10]]},
]
STOPS = (3, 17)


@pytest.mark.parametrize("settings", CASES, ids=lambda s: "-".join(s))
def test_tokens_are_those_of_torch(settings: dict[str, Any]) -> None:
    random = np.random.default_rng(0)
    params = SamplingParams(**settings)
    seen = set()
    for number in range(60):
        logits = (3 * random.standard_normal(VOCAB)).astype(np.float32)
        logits[random.integers(0, VOCAB, 30)] = np.float32(4.0)
        prompt, output = [5, 6, 7], [40, 9, 9, 40][: number % 5]
        mine = choose(
            logits, params, prompt=prompt, output=output, seed=number, stop_token_ids=STOPS
        )
        noise = uniform(np.array([number], np.uint64), np.array([len(prompt) + len(output)]))
        theirs = draw(
            torch.from_numpy(logits[None]),
            [params],
            noise=noise,
            prompts=[prompt],
            outputs=[output],
            stops=[STOPS],
        )
        assert mine == int(theirs.token_ids[0])
        seen.add(mine)
    assert len(seen) > 1


def test_masks_leave_what_they_allow() -> None:
    logits = np.arange(10, dtype=np.float32)
    greedy = SamplingParams(temperature=0.0)
    assert choose(logits, greedy, prompt=[1], output=[], seed=0, mask=[2, 5, 11]) == 5
    drawn = SamplingParams(temperature=5.0)
    got = {choose(logits, drawn, prompt=[1], output=[], seed=s, mask=[2, 5]) for s in range(50)}
    assert got == {2, 5}


def test_log_probabilities_sum_to_one() -> None:
    x = np.random.default_rng(0).standard_normal((4, 50)).astype(np.float32) * 30
    assert np.allclose(np.exp(log_softmax(x)).sum(-1), 1)
