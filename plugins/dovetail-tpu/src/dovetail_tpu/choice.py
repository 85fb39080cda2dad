"""Choosing tokens inside a compiled program: ``platforms/torch/sampler.py`` in jnp.

A token's weight is a whole number of units and sums are taken in int64, so they are exact in any
order, and a row's token does not depend on the rest of the batch. Traced with 64-bit types on.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

__all__ = ["Controls", "Rules", "Scores", "choose", "score", "shaped", "unmasked"]

_GREEDY_BELOW = 1e-5
_BITS = 24
"""Noise is a multiple of 2**-24, and top_p is rounded to one."""
_BLOCK = 256


class Controls(NamedTuple):
    """Numbers of N rows, float32: first of this step, then what their requests ask of all steps.

    The names are those of ``SamplingBatch`` and ``SamplingParams``.
    """

    temperature: Any
    top_k: Any
    top_p: Any
    min_p: Any
    uniform: Any
    num_generated: Any
    min_tokens: Any
    repetition_penalty: Any
    frequency_penalty: Any
    presence_penalty: Any
    shapes_logits: Any


class Rules(NamedTuple):
    """What rows ask of their logits, and what they have said: a row of V for each of R rows."""

    bias: Any
    """float32: added; minus infinity where a token is not allowed."""
    stops: Any
    """bool: not before min_tokens."""
    seen: Any
    """bool: in the prompt."""
    counts: Any
    """int32: in the output."""

    @classmethod
    def none(cls, *shape: int) -> Rules:
        """Those that change nothing, on the host."""
        dtypes = (np.float32, np.bool_, np.bool_, np.int32)
        return cls(*(np.zeros(shape, dtype) for dtype in dtypes))


class Scores(NamedTuple):
    """As ``core.batch.LogprobArrays``, on the device."""

    token_ids: Array
    logprobs: Array
    ranks: Array


def unmasked(x_NV: Array, bits_NW: Array) -> Array:
    """Minus infinity is added to what the bits forbid."""
    bits = (bits_NW[:, :, None] >> jnp.arange(32, dtype=jnp.int32)) & 1
    allowed = bits.reshape(bits.shape[0], -1)[:, : x_NV.shape[1]] == 1
    return x_NV + jnp.where(allowed, jnp.float32(0), -jnp.inf)


def shaped(x_NV: Array, rules: Rules, rows_N: Array, controls: Controls) -> Array:
    """By the rules of each of some rows: bias and allowed tokens, min_tokens, penalties.

    NaN and infinity stay what they are, whatever else is forbidden.
    """
    each = Controls(*(control[:, None] for control in controls))
    bias, stops, seen, counts = (jnp.take(table, rows_N, 0, mode="clip") for table in rules)
    early = stops & (each.num_generated < each.min_tokens)
    x = x_NV + bias + jnp.where(early, -jnp.inf, jnp.float32(0))
    said = counts > 0
    penalised = jnp.where(x > 0, x / each.repetition_penalty, x * each.repetition_penalty)
    penalised -= each.frequency_penalty * counts.astype(jnp.float32)
    penalised -= each.presence_penalty * said
    return jnp.where(each.shapes_logits > 0, jnp.where(seen | said, penalised, x), x_NV)


def choose(x_NV: Array, peak_N1: Array, way: Array, controls: Controls) -> Array:
    """(N,) int32 tokens of float32 logits with these peaks.

    Args:
        way: 0 if every row is greedy, 1 if rows are drawn, 2 if that is from what min_p, top_k and
            top_p leave.
    """
    likeliest = jnp.argmax(x_NV, -1).astype(jnp.int32)
    cold = controls.temperature < _GREEDY_BELOW
    heat = jnp.where(cold, 1, controls.temperature)[:, None]

    def drawn(kept: Any) -> Array:
        weights = jnp.where(kept, _weights(x_NV, peak_N1, heat), 0)
        target = _share(controls.uniform[:, None], jnp.sum(weights, -1, keepdims=True))
        return jnp.where(cold, likeliest, _first_beyond(weights, target)[:, 0].astype(jnp.int32))

    def restricted() -> Array:
        return drawn(_kept(x_NV, peak_N1, heat, controls))

    chosen: Array = lax.switch(way, (lambda: likeliest, lambda: drawn(True), restricted))
    return chosen


def score(x_NV: Array, chosen_N: Array, heat_N: Array, k: int) -> Scores:
    """Log-probabilities of float32 logits over a temperature: the chosen, then the k likeliest."""
    x = x_NV / heat_N[:, None]
    peak = jnp.max(x, -1, keepdims=True)
    total = jnp.sum(_weights(x, peak, jnp.float32(1)), -1, keepdims=True)
    value = jnp.take_along_axis(x, chosen_N[:, None], 1)
    best, ids = lax.top_k(x, k)
    logs = jnp.concatenate((value, best), 1) - peak
    logs = logs - jnp.log(total.astype(jnp.float32) / jnp.float32(_unit(x.shape[1])))
    ranks = 1 + jnp.sum(x > value, -1, dtype=jnp.int32)
    return Scores(jnp.concatenate((chosen_N[:, None], ids.astype(jnp.int32)), 1), logs, ranks)


def _unit(vocab_size: int) -> float:
    """Units in the weight of a row's likeliest token: sums stay below 2**52."""
    return 2.0 ** (52 - vocab_size.bit_length())


def _weights(x_NV: Array, peak_N1: Array, heat_N1: Array) -> Array:
    """int64."""
    scaled = jnp.exp((x_NV - peak_N1) / heat_N1) * jnp.float32(_unit(x_NV.shape[1]))
    return jnp.round(scaled).astype(jnp.int64)


def _kept(x_NV: Array, peak_N1: Array, heat_N1: Array, controls: Controls) -> Array:
    """What min_p, top_k and top_p leave, each of what the one before left; ties to lower ids."""
    ids = lax.broadcasted_iota(jnp.int32, x_NV.shape, 1)
    falling, order = lax.sort((-(x_NV + 0.0), ids), dimension=1, num_keys=1, is_stable=True)
    values = -falling
    passes = (values - peak_N1) / heat_N1 >= jnp.log(controls.min_p[:, None])
    passes &= ids < controls.top_k[:, None]
    weights = jnp.where(passes, _weights(values, peak_N1, heat_N1), 0)
    goal = -_share(controls.top_p[:, None], -jnp.sum(weights, -1, keepdims=True))
    last = _first_beyond(weights, goal - 1)
    value, token = (jnp.take_along_axis(array, last, 1) for array in (values, order))
    return jnp.logical_or(x_NV > value, (x_NV == value) & (ids <= token))


def _share(fraction_N1: Array, total_N1: Array) -> Array:
    """The floor of a product of a fraction, in 2**-24, and an int64 below 2**52, exactly."""
    part = jnp.round(fraction_N1 * jnp.float32(2**_BITS)).astype(jnp.int64)
    high, low = total_N1 >> _BITS, total_N1 & (2**_BITS - 1)
    product: Array = part * high + (part * low >> _BITS)
    return product


def _first_beyond(weights_NC: Array, target_N1: Array) -> Array:
    """(N, 1) the first column whose running sum exceeds the target, held below the last sum."""
    rows, columns = weights_NC.shape
    blocks = jnp.pad(weights_NC, ((0, 0), (0, -columns % _BLOCK))).reshape(rows, -1, _BLOCK)
    sums = jnp.sum(blocks, -1)
    ends = jnp.cumsum(sums, -1)
    target = jnp.minimum(target_N1, ends[:, -1:] - 1)
    block = jnp.minimum(jnp.sum(ends <= target, -1, keepdims=True), sums.shape[1] - 1)
    before = jnp.take_along_axis(ends - sums, block, 1)
    inside = jnp.cumsum(jnp.take_along_axis(blocks, block[:, :, None], 1)[:, 0], -1)
    column = block * _BLOCK + jnp.sum(inside <= target - before, -1, keepdims=True)
    return jnp.minimum(column, columns - 1)
