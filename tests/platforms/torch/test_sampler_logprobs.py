import numpy as np
import pytest
import torch

from dovetail.platforms.torch.sampler import Sampler
from tests.platforms.torch.sampling_cases import (
    CPU,
    all_params,
    batch_of,
    joined,
    logits_of,
    noise_of,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [3, 64, 1000, 5000])
def test_logprobs_against_numpy(dtype, vocab):
    logits = logits_of(7, vocab, dtype=dtype)
    logits[2] = 0.0
    logits[3, 1:] = -torch.inf
    chosen = torch.tensor([0, vocab - 1, 2, 1, vocab // 2, 1, 2])
    k = 5
    found = Sampler(vocab, 7, CPU).logprobs(logits, chosen, k)
    x = logits.double().numpy()
    expected = x - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True))
    expected -= x.max(-1, keepdims=True)
    kept = min(k, vocab)
    assert found.token_ids.shape == found.logprobs.shape == (7, 1 + kept)
    assert found.token_ids[:, 0].tolist() == chosen.tolist()
    for i in range(7):
        order = sorted(range(vocab), key=lambda t: (-x[i, t], t))[:kept]
        assert found.token_ids[i, 1:].tolist() == order
        ids = found.token_ids[i].numpy()
        np.testing.assert_allclose(found.logprobs[i].numpy(), expected[i, ids], atol=2e-6)
        assert found.ranks[i] == 1 + (x[i] > x[i, chosen[i]]).sum()
    assert found.logprobs.dtype == torch.float32 and found.ranks.dtype == torch.int64


def test_logprobs_are_of_the_raw_logits_and_of_the_chosen_token():
    params = all_params()
    logits, noise = logits_of(len(params), 300), noise_of(len(params))
    sampler = Sampler(300, 16, CPU)
    sampler.join([joined(i, p, (1, 2), stops=(3,)) for i, p in enumerate(params)])
    result = sampler.sample(logits, batch_of(params, 300, noise=noise, num_logprobs=3))
    raw = torch.log_softmax(logits, -1)
    assert torch.equal(result.logprobs.token_ids[:, 0], result.token_ids)
    assert torch.allclose(result.logprobs.logprobs, raw.gather(1, result.logprobs.token_ids))
    only = sampler.logprobs(logits, result.token_ids, 0)
    assert only.token_ids.shape == (len(params), 1)
    assert torch.equal(only.logprobs[:, 0], result.logprobs.logprobs[:, 0])


def test_logprobs_have_the_same_bits_in_any_batch():
    logits, chosen = logits_of(9, 40_000), torch.arange(9)
    sampler = Sampler(40_000, 9, CPU)
    whole = sampler.logprobs(logits, chosen, 4).logprobs
    for i in range(9):
        assert torch.equal(
            sampler.logprobs(logits[i : i + 1], chosen[i : i + 1], 4).logprobs[0], whole[i]
        )


def test_no_rows_are_no_trouble():
    sampler, none = Sampler(100, 2, CPU), torch.zeros(0, dtype=torch.int64)
    found = sampler.logprobs(torch.zeros(0, 100), none, 3)
    assert found.token_ids.shape == found.logprobs.shape == (0, 4) and found.ranks.shape == (0,)
    assert sampler.sample(torch.zeros(0, 100), batch_of([], 100)).token_ids.shape == (0,)
