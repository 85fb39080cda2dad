"""Tokens and log-probabilities chosen in a compiled program, against the torch sampler."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from dovetail_tpu.choice import _first_beyond, _share
from dovetail_tpu.loading import AXIS
from dovetail_tpu.ops import references
from dovetail_tpu.programs import Programs
from dovetail_tpu.sampler import Sampler
from dovetail_tpu.transfers import Meter, pack, unpack

from dovetail.core.batch import Batch, TokenMasks
from dovetail.core.request import SamplingParams
from dovetail.platforms.torch.sampler import Sampler as TorchSampler
from tests.platforms.torch.sampling_cases import (
    all_params,
    batch_of,
    joined,
    logits_of,
    noise_of,
)

MAX_ROWS = 16
STOPS = (1, 5, 9)


class Unembedded:
    """A model whose hidden states are the logits."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def logits(self, ops: Any, weights: Any, hidden_ND: Any) -> Any:
        return hidden_ND


def make_sampler(vocab: int) -> Sampler:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (AXIS,))
    backend: Any = SimpleNamespace(heads_axis=0, copy_blocks=None)
    need: Any = SimpleNamespace(specs=())
    model: Any = Unembedded(vocab)
    return Sampler(Programs(model, {}, backend, need, mesh, Meter()), vocab, MAX_ROWS)


def both(
    logits: torch.Tensor, batches: list[Batch], rows: list[Any]
) -> list[tuple[np.ndarray, np.ndarray, Any, Any]]:
    """Tokens of torch and of JAX for each batch, of rows that joined before the first."""
    vocab = logits.shape[1]
    torch_sampler = TorchSampler(vocab, MAX_ROWS, torch.device("cpu"))
    sampler = make_sampler(vocab)
    torch_sampler.join(rows)
    sampler.join(rows)
    out = []
    for batch in batches:
        place = batch.sampled
        wanted = torch_sampler.sample(logits[place].clone(), batch)
        # Two rows of nobody behind, as in a padded step.
        hidden = np.pad(logits[place].numpy(), ((0, 2), (0, 0)))
        tokens, finite = sampler.sample(jnp.asarray(hidden), batch)
        scores = None
        if batch.sampling.num_logprobs is not None:
            heats, k = sampler.heats[batch.rows[place]], batch.sampling.num_logprobs
            scores = sampler.score(jnp.asarray(hidden), tokens, heats, k)
        count = len(place)
        assert np.asarray(finite)[:count].tolist() == wanted.finite.tolist()
        found = np.asarray(tokens)[:count]
        out.append((found, wanted.token_ids.numpy(), scores, wanted.logprobs))
    return out


@pytest.mark.parametrize("vocab", [97, 4099])
def test_every_kind_of_row_over_some_steps(vocab: int) -> None:
    params = all_params()
    count = len(params)
    rows = [
        joined(i, p, prompt=(3, 7, 11, 3), output=(5, 5, 2), stops=STOPS)
        for i, p in enumerate(params)
    ]
    logits = logits_of(count, vocab)
    batches = [
        batch_of(params, vocab, noise=noise_of(count, seed), num_generated=[3 + seed] * count)
        for seed in range(6)
    ]
    for found, wanted, _, _ in both(logits, batches, rows):
        assert found.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=1.1),
        SamplingParams(temperature=0.8, top_k=30, top_p=0.9),
        SamplingParams(top_p=0.3),
        SamplingParams(top_p=1e-3),
        SamplingParams(min_p=0.05, top_p=0.95),
    ],
    ids=lambda p: f"{p.temperature}, {p.top_k}, {p.top_p}, {p.min_p}",
)
def test_each_kind_of_program(params: SamplingParams) -> None:
    vocab, count = 1000, 12
    rows = [joined(i, params) for i in range(count)]
    logits = torch.cat([logits_of(6, vocab, scale=s) for s in (0.5, 4.0)])
    batches = [batch_of([params] * count, vocab, noise=noise_of(count, s)) for s in range(20)]
    for found, wanted, _, _ in both(logits, batches, rows):
        assert found.tolist() == wanted.tolist()


def test_equal_logits_go_to_the_lower_id() -> None:
    vocab = 300
    logits = torch.zeros(6, vocab)
    logits[:, ::7] = 2.0
    logits[:, 5] = -0.0
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(top_k=10),
        SamplingParams(top_p=0.1),
    ):
        batch = batch_of([params] * 6, vocab, noise=noise_of(6))
        ((found, wanted, _, _),) = both(logits, [batch], [joined(i, params) for i in range(6)])
        assert found.tolist() == wanted.tolist()


def test_what_is_not_finite_is_said_of_its_row_alone() -> None:
    vocab = 64
    logits = logits_of(6, vocab)
    logits[1, 3] = torch.nan
    logits[2, 4] = torch.inf
    logits[3, :] = -torch.inf
    params = [SamplingParams()] * 3 + [SamplingParams(), SamplingParams(top_k=3)]
    params.append(SamplingParams(temperature=0.0))
    batch = batch_of(params, vocab, noise=noise_of(6))
    ((found, wanted, _, _),) = both(logits, [batch], [joined(i, p) for i, p in enumerate(params)])
    assert found.tolist() == wanted.tolist()


def test_masks_hold_and_rows_beside_them_are_free() -> None:
    vocab, params = 97, all_params()
    count = len(params)
    rng = np.random.default_rng(0)
    flags = rng.random((3, 128)) < 0.2
    bits = np.packbits(flags, axis=1, bitorder="little").view(np.int32)
    masks = TokenMasks(places=np.array([0, 4, 9], np.int32), bits=bits)
    batch = batch_of(params, vocab, noise=noise_of(count), num_generated=[0] * count)
    batch = replace(batch, sampling=replace(batch.sampling, masks=masks))
    rows = [joined(i, p, stops=STOPS) for i, p in enumerate(params)]
    ((found, wanted, _, _),) = both(logits_of(count, vocab), [batch], rows)
    assert found.tolist() == wanted.tolist()
    assert all(flags[i, found[place]] for i, place in enumerate(masks.places))


def test_a_row_that_is_given_away_forgets_its_rules() -> None:
    vocab = 50
    logits, plain = logits_of(2, vocab), SamplingParams(temperature=0.0)
    ruled = SamplingParams(temperature=0.0, allowed_token_ids=[3])
    sampler = make_sampler(vocab)
    sampler.join([joined(0, ruled), joined(1, ruled)])
    sampler.join([joined(0, plain)])
    batch = batch_of([plain, ruled], vocab)
    tokens, _ = sampler.sample(jnp.asarray(logits.numpy()), batch)
    assert np.asarray(tokens).tolist() == [int(logits[0].argmax()), 3]


@pytest.mark.parametrize("k", [0, 5, 40])
def test_logprobs(k: int) -> None:
    vocab, params = 1000, [SamplingParams(), SamplingParams(temperature=0.0, logprobs=k)]
    params.append(SamplingParams(use_beam_search=True, n=2, temperature=2.0))
    rows = [joined(i, p) for i, p in enumerate(params)]
    batch = batch_of(params, vocab, noise=noise_of(3), num_logprobs=k)
    ((found, wanted, scores, want),) = both(logits_of(3, vocab), [batch], rows)
    assert found.tolist() == wanted.tolist()
    ids, logprobs, ranks = (np.asarray(array)[:3] for array in scores)
    assert ids[:, : k + 1].tolist() == want.token_ids.tolist()
    np.testing.assert_allclose(logprobs[:, : k + 1], want.logprobs.numpy(), atol=1e-5)
    assert ranks.tolist() == want.ranks.tolist()


def test_products_and_sums_are_exact() -> None:
    rng = np.random.default_rng(0)
    totals = rng.integers(1, 2**52, 200)
    parts = rng.integers(0, 2**24, 200)
    weights = rng.integers(0, 2**40, (200, 700))
    targets = np.concatenate([rng.integers(0, 2**49, 197), [0, -1, 2**52]])
    with jax.enable_x64(True):
        fractions = jnp.asarray((parts / 2**24).astype(np.float32))
        down = np.asarray(_share(fractions, jnp.asarray(totals)))
        up = -np.asarray(_share(fractions, -jnp.asarray(totals)))
        columns = np.asarray(_first_beyond(jnp.asarray(weights), jnp.asarray(targets)[:, None]))
    exact = [int(p) * int(t) for p, t in zip(parts, totals, strict=True)]
    assert down.tolist() == [e >> 24 for e in exact]
    assert up.tolist() == [-(-e >> 24) for e in exact]
    sums = weights.cumsum(-1)
    held = np.minimum(targets, sums[:, -1] - 1)
    assert columns[:, 0].tolist() == (sums <= held[:, None]).sum(-1).tolist()


def test_packed_trees_come_out_as_they_went_in() -> None:
    tree = {
        "floats": np.array([[0.5, -np.inf], [np.nan, -0.0]], np.float32),
        "nothing": None,
        "numbers": (np.array([1, -2], np.int32), np.array(7, np.int32), np.zeros((0, 3), np.int32)),
    }
    packed = pack(tree)
    assert packed.words.shape == (7,)
    found = jax.jit(unpack)(packed)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    for mine, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(tree), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        np.testing.assert_array_equal(np.asarray(mine), theirs)


def test_every_op_has_a_reference() -> None:
    from dovetail.core.contracts.ops import OP_NAMES

    assert set(references()) == set(OP_NAMES)
