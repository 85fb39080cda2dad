"""Token masks on the device, against the definition, and beside rows that have none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dovetail.core.batch import TokenMasks
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.sampler import Sampler
from dovetail.platforms.torch.sampling.masks import masked
from tests.platforms.torch.sampling_cases import (
    CPU,
    all_params,
    batch_of,
    joined,
    logits_of,
    noise_of,
)

GREEDY = SamplingParams(temperature=0.0)


def random_masks(places: list[int], vocab: int, *, share: float, seed: int = 0) -> TokenMasks:
    """Masks that allow about this share of the tokens, and at least one."""
    rng = np.random.default_rng(seed)
    width = -(-vocab // 32)
    flags = rng.random((len(places), 32 * width)) < share
    flags[np.arange(len(places)), rng.integers(0, vocab, len(places))] = True
    octets = np.packbits(flags, axis=1, bitorder="little")
    return TokenMasks(places=np.array(places, np.int32), bits=octets.view(np.int32))


def allowed(masks: TokenMasks, vocab: int) -> torch.Tensor:
    """(M, V) bool: the definition, on any device."""
    bits = torch.from_numpy(masks.bits)
    places = torch.arange(32, dtype=torch.int32)
    return ((bits[:, :, None] >> places) & 1).flatten(1)[:, :vocab] == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab", [1, 31, 32, 33, 97, 1000, 4096])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_what_is_forbidden_is_minus_infinity_and_nothing_else_changes(
    dtype: torch.dtype, vocab: int, share: float
) -> None:
    logits = torch.randn(5, vocab).to(dtype)
    for places in ([0, 1, 2, 3, 4], [1, 4], [2]):
        masks = random_masks(places, vocab, share=share)
        want = logits.clone()
        want[places] = want[places].where(allowed(masks, vocab), -torch.inf)
        kept = logits.clone()
        assert torch.equal(masked(kept, masks, keep=True), want)
        assert torch.equal(kept, logits)
        changed = logits.clone()
        assert masked(changed, masks, keep=False).data_ptr() == changed.data_ptr()
        assert torch.equal(changed, want)


@pytest.mark.parametrize("seed", range(3))
def test_each_row_chooses_as_if_the_forbidden_tokens_had_no_weight(seed: int) -> None:
    vocab, params = 997, [p for p in all_params() for _ in range(4)]
    places = list(range(0, len(params), 2))
    logits, noise = logits_of(len(params), vocab), noise_of(len(params), seed=seed)
    masks = random_masks(places, vocab, share=0.1, seed=seed)
    batch = batch_of(params, vocab, noise=noise)
    batch = replace(batch, sampling=replace(batch.sampling, masks=masks))
    got = _sample(logits.clone(), params, batch)
    by_hand = logits.clone()
    by_hand[places] = by_hand[places].where(allowed(masks, vocab), -torch.inf)
    plain = batch_of(params, vocab, noise=noise)
    assert torch.equal(got.token_ids, _sample(by_hand, params, plain).token_ids)
    chosen = got.token_ids[places]
    fits = allowed(masks, vocab)[torch.arange(len(places)), chosen]
    assert (fits | ~got.finite[places]).all() and got.finite[places].sum() > len(places) // 2
    free = [i for i in range(len(params)) if i not in places]
    unmasked = _sample(logits.clone(), params, plain).token_ids
    assert torch.equal(got.token_ids[free], unmasked[free]), "rows without a mask notice nothing"


def _sample(logits: torch.Tensor, params: list[SamplingParams], batch):  # type: ignore[no-untyped-def]
    sampler = Sampler(logits.shape[1], len(params), CPU)
    sampler.join([joined(i, p) for i, p in enumerate(params)])
    return sampler.sample(logits, batch)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_one_allowed_token_is_chosen_however_unlikely(temperature: float) -> None:
    logits = torch.zeros(2, 64)
    logits[:, 7] = -1000.0
    bits = np.zeros((2, 2), np.int32)
    bits[:, 0] = 1 << 7
    masks = TokenMasks(places=np.array([0, 1], np.int32), bits=bits)
    params = [SamplingParams(temperature=temperature)] * 2
    batch = batch_of(params, 64, noise=np.array([0.0, 0.999]))
    batch = replace(batch, sampling=replace(batch.sampling, masks=masks))
    result = _sample(logits, params, batch)
    assert result.token_ids.tolist() == [7, 7] and result.finite.all()


def test_log_probabilities_are_of_the_raw_logits() -> None:
    vocab, params = 97, [SamplingParams(temperature=0.0, logprobs=3)] * 3
    logits = logits_of(3, vocab)
    masks = random_masks([0, 2], vocab, share=0.05)
    batch = batch_of(params, vocab, num_logprobs=3)
    batch = replace(batch, sampling=replace(batch.sampling, masks=masks))
    result = _sample(logits.clone(), params, batch)
    want = torch.log_softmax(logits.float(), -1)
    assert result.logprobs is not None
    chosen = want.gather(1, result.token_ids[:, None])[:, 0]
    assert torch.allclose(result.logprobs.logprobs[:, 0], chosen, atol=1e-5)
    assert torch.allclose(result.logprobs.logprobs[:, 1:], want.topk(3).values, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_show_also_where_they_are_forbidden(
    value: float, temperature: float
) -> None:
    logits = torch.randn(3, 64)
    logits[1, 40] = value
    bits = np.full((3, 2), 0b1111, np.int32)
    bits[:, 1] = 0
    masks = TokenMasks(places=np.arange(3, dtype=np.int32), bits=bits)
    params = [SamplingParams(temperature=temperature)] * 3
    batch = batch_of(params, 64)
    batch = replace(batch, sampling=replace(batch.sampling, masks=masks))
    assert _sample(logits, params, batch).finite.tolist() == [True, False, True]


def test_a_mask_that_allows_nothing_shows() -> None:
    masks = TokenMasks(places=np.array([1], np.int32), bits=np.zeros((1, 2), np.int32))
    batch = batch_of([GREEDY] * 2, 64)
    batch = replace(batch, sampling=replace(batch.sampling, masks=masks))
    assert _sample(torch.randn(2, 64), [GREEDY] * 2, batch).finite.tolist() == [True, False]
