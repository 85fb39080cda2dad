"""Choosing the next token, in numpy: the definition that platforms' samplers are compared with.

The order of work is that of ``platforms/torch/sampler.py``: token masks; allowed tokens, biases,
early stops, bad words; repetition, frequency and presence penalties; then the likeliest token where
the temperature is 0, and elsewhere min_p, top_k and top_p, each on what the one before left, and a
draw by the noise of (seed, position). "Likelier" is a total order: the larger logit, and of equal
logits the lower id.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from dovetail.core.request import SamplingParams
from dovetail.core.sampling.noise import uniform
from dovetail.core.types import FloatArray

__all__ = ["choose", "log_softmax"]

_Wide = npt.NDArray[np.float64]


def log_softmax(logits: npt.NDArray[np.floating]) -> _Wide:
    """Log-probabilities over the last axis, in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    result: _Wide = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result


def choose(
    logits_V: FloatArray,
    params: SamplingParams,
    *,
    prompt: Sequence[int],
    output: Sequence[int],
    seed: int,
    stop_token_ids: Sequence[int] = (),
    mask: Collection[int] | None = None,
) -> int:
    """The token that follows ``prompt`` and ``output``.

    Args:
        logits_V: (V,) float32, as the model gave them.
        params: Of the request; bad words as token ids.
        prompt: Not empty.
        output: The tokens generated so far.
        seed: Of the request's noise.
        stop_token_ids: Tokens that may not come before ``params.min_tokens`` tokens.
        mask: The tokens that a grammar allows; None: all.
    """
    x = logits_V.astype(np.float32)
    if mask is not None:
        x = _only(x, mask)
    x = _ruled(x, params, output, stop_token_ids)
    x = _penalised(x, params, prompt, output)
    if params.is_greedy:
        return int(x.argmax())
    noise = uniform(np.array([seed % (1 << 64)], np.uint64), np.array([len(prompt) + len(output)]))
    return _drawn(x, params, float(noise[0]))


def _only(x: FloatArray, allowed: Collection[int]) -> FloatArray:
    kept = np.full_like(x, -np.inf)
    ids = [token for token in allowed if token < len(x)]
    kept[ids] = x[ids]
    return kept


def _ruled(
    x: FloatArray, params: SamplingParams, output: Sequence[int], stops: Sequence[int]
) -> FloatArray:
    """Allowed tokens, biases, early stops, bad words."""
    if params.allowed_token_ids:
        x = _only(x, params.allowed_token_ids)
    x = x.copy()
    for token, bias in (params.logit_bias or {}).items():
        x[token] += np.float32(bias)
    if len(output) < params.min_tokens:
        x[list(stops)] = -np.inf
    for word in params.bad_words_token_ids or ():
        head = list(word[:-1])
        if not head or list(output[-len(head) :]) == head:
            x[word[-1]] = -np.inf
    return x


def _penalised(
    x: FloatArray, params: SamplingParams, prompt: Sequence[int], output: Sequence[int]
) -> FloatArray:
    seen = np.unique(np.array([*prompt, *output], np.int64))
    counts = np.bincount(np.array(output, np.int64), minlength=len(x))[seen]
    x = x.copy()
    some = x[seen]
    repetition = np.float32(params.repetition_penalty)
    some = np.where(some > 0, some / repetition, some * repetition)
    some -= np.float32(params.frequency_penalty) * counts.astype(np.float32)
    some -= np.float32(params.presence_penalty) * (counts > 0).astype(np.float32)
    x[seen] = some
    return x


def _drawn(x: FloatArray, params: SamplingParams, noise: float) -> int:
    """Invert the cumulative distribution, tokens in order of id.

    Weights are rounded to whole numbers of units so small that all of a row's sum to less than
    2**52: float64 sums of them are exact.
    """
    vocab = len(x)
    order = np.argsort(-x, kind="stable")
    scaled = (x[order] - x[order[0]]) / np.float32(params.temperature)
    units = np.float32(2.0 ** (52 - vocab.bit_length()))
    weights = np.rint(np.exp(scaled) * units).astype(np.float64)
    if params.min_p > 0:
        weights[scaled < np.float32(np.log(params.min_p))] = 0
    if params.top_k:
        weights[params.top_k :] = 0
    sums = weights.cumsum()
    last = int((sums < params.top_p * sums[-1]).sum())
    weights[last + 1 :] = 0
    by_id = np.zeros(vocab)
    by_id[order] = weights
    ends = by_id.cumsum()
    return int((ends <= min(noise * ends[-1], ends[-1] - 1)).sum())
