"""Batches for the sampler's tests, and a small numpy oracle that shares no code with it."""

import numpy as np
import torch

from dovetail.core.batch import Batch, JoinedRow, SamplingBatch
from dovetail.core.request import SamplingParams
from dovetail.core.sampling.noise import uniform
from dovetail.platforms.torch.sampler import Sampler

CPU = torch.device("cpu")


def batch_of(params, vocab, *, rows=None, noise=None, num_generated=None, num_logprobs=None):
    """A step in which every row gets a token."""
    count = len(params)
    rows = np.arange(count, dtype=np.int32) if rows is None else np.array(rows, np.int32)
    noise = np.zeros(count) if noise is None else noise
    num_generated = np.zeros(count) if num_generated is None else num_generated
    ones = np.ones(count, np.int32)
    empty = np.zeros(0, np.int32)
    sampling = SamplingBatch(
        temperature=np.array([p.temperature for p in params], np.float32),
        top_k=np.array([min(p.top_k or vocab, vocab) for p in params], np.int32),
        top_p=np.array([p.top_p for p in params], np.float32),
        min_p=np.array([p.min_p for p in params], np.float32),
        uniform=np.asarray(noise, np.float32),
        num_generated=np.asarray(num_generated, np.int32),
        all_greedy=all(p.is_greedy for p in params),
        restricts=any(p.top_k or p.top_p < 1 or p.min_p for p in params),
        shapes_logits=any(p.shapes_logits for p in params),
        num_logprobs=num_logprobs,
    )
    return Batch(
        step=0,
        rows=rows,
        query_lens=ones,
        context_lens=ones,
        block_tables=np.zeros((count, 1), np.int32),
        token_ids=np.zeros(count, np.int32),
        carried=empty,
        carried_rows=empty,
        sampled=np.arange(count, dtype=np.int32),
        sampling=sampling,
        copies=np.zeros((0, 2), np.int32),
    )


def joined(row, params, prompt=(0,), output=(), stops=()):
    return JoinedRow(
        row=row,
        token_ids=np.array([*prompt, *output], np.int32),
        num_prompt_tokens=len(prompt),
        params=params,
        stop_token_ids=tuple(stops),
    )


def draw(logits, params, *, noise=None, prompts=None, outputs=None, stops=None, max_rows=64):
    """Tokens of one step for rows that have just joined."""
    count, vocab = logits.shape
    sampler = Sampler(vocab, max_rows, CPU)
    prompts, outputs = prompts or [(0,)] * count, outputs or [()] * count
    sampler.join(
        [
            joined(i, p, prompts[i], outputs[i], stops[i] if stops else ())
            for i, p in enumerate(params)
        ]
    )
    batch = batch_of(params, vocab, noise=noise, num_generated=[len(o) for o in outputs])
    return sampler.sample(logits, batch)


def noise_of(count, seed=0):
    return uniform(np.full(count, seed, np.uint64), np.arange(count))


def shaped(logits, params, prompt=(), output=(), stops=()):
    """Float64 logits of one row after everything but the temperature."""
    x = np.array(logits, np.float64)
    if params.allowed_token_ids:
        x[[t for t in range(len(x)) if t not in params.allowed_token_ids]] = -np.inf
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(output) < params.min_tokens:
        x[list(stops)] = -np.inf
    for token in set(prompt) | set(output):
        x[token] = (
            x[token] / params.repetition_penalty
            if x[token] > 0
            else x[token] * params.repetition_penalty
        )
    for token in set(output):
        x[token] -= params.frequency_penalty * output.count(token) + params.presence_penalty
    return x


def probabilities(x, params):
    """Of one row of float64 logits: temperature, then min_p, top_k and top_p, one after another."""
    p = np.exp((x - x.max()) / params.temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda token: (-x[token], token))
    p[p < params.min_p * p.max()] = 0
    if params.top_k:
        p[order[params.top_k :]] = 0
    p /= p.sum()
    reached = 0.0
    for token in order:
        kept = reached < params.top_p
        reached += p[token]
        p[token] *= kept
    return p / p.sum()


def all_params():
    """One of each kind, and some of all at once."""
    return [
        SamplingParams(temperature=0.0),
        SamplingParams(temperature=0.7),
        SamplingParams(temperature=1.3, top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=0.9, top_k=20, top_p=0.9, min_p=0.02),
        SamplingParams(temperature=2.0, top_p=0.999),
        SamplingParams(top_k=1),
        SamplingParams(temperature=0.0, repetition_penalty=1.5),
        SamplingParams(repetition_penalty=0.7, frequency_penalty=0.5, presence_penalty=-0.4),
        SamplingParams(logit_bias={3: 5.0, 7: -100.0}, top_p=0.9),
        SamplingParams(allowed_token_ids=[2, 3, 5, 7, 11], temperature=1.5),
        SamplingParams(min_tokens=4, max_tokens=9, temperature=0.0),
    ]


def logits_of(count, vocab, seed=0, scale=3.0, dtype=torch.float32):
    rng = np.random.default_rng(seed)
    return torch.tensor(rng.normal(size=(count, vocab)) * scale, dtype=torch.float32).to(dtype)
