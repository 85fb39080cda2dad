"""The same definitions over numpy: nothing in them needs torch."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Linear, StepInputs
from dovetail.core.contracts.ops import OP_NAMES
from dovetail.core.models.weights import Leaf, Source, assemble, fill, leaves, open_checkpoint
from tests.checkpoints import FAMILIES, make_checkpoint
from tests.core.models.harness import model_of, our_logits, random_tokens

Array = np.ndarray[Any, Any]


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def add_rms_norm(x: Array, residual: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    return rms_norm(x + residual, weight, eps), x + residual


def layer_norm(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight + bias


def rotary(x: Array, cos: Array, sin: Array) -> Array:
    half = cos.shape[-1]
    a, b, rest = np.split(x, [half, 2 * half], axis=-1)
    cos, sin = cos[:, None], sin[:, None]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def gelu_tanh(x: Array) -> Array:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def silu(x: Array) -> Array:
    return x / (1 + np.exp(-x))


def gated(activation: Any) -> Any:
    def apply(x: Array) -> Array:
        gate, up = np.split(x, 2, axis=-1)
        return activation(gate) * up

    return apply


def attention(
    q: Array, k: Array, v: Array, cache: Any, plan: object, spec: AttentionSpec
) -> tuple[Array, Any]:
    group = spec.num_heads // spec.num_kv_heads
    k, v = (np.repeat(x, group, axis=1) for x in (k, v))
    scores = np.einsum("the,she->hts", q, k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * np.tanh(scores / spec.soft_cap)
    distance = np.arange(len(q))[:, None] - np.arange(len(q))
    seen = (distance >= 0) & (distance < (spec.window or len(q)))
    weights = np.exp(np.where(seen, scores - scores.max(), -np.inf))
    return np.einsum("hts,she->the", weights / weights.sum(-1, keepdims=True), v), cache


OPS = SimpleNamespace(
    embedding=lambda ids, table: table[ids],
    linear=lambda x, bound: x @ bound[0].T + bound[1],
    int8_linear=lambda x, codes, scales: (x @ codes.T.astype(x.dtype)) * scales,
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    layer_norm=layer_norm,
    rotary=rotary,
    silu_and_mul=gated(silu),
    gelu_tanh_and_mul=gated(gelu_tanh),
    gelu=None,
    gelu_tanh=gelu_tanh,
    relu=lambda x: np.maximum(x, 0),
    silu=silu,
    soft_cap=lambda x, cap: cap * np.tanh(x / cap),
    attention=attention,
    all_reduce=lambda x: x,
)


def bound(leaf: Leaf, source: Source) -> Any:
    parts = assemble(leaf, source)
    if isinstance(leaf, Linear):
        return np.concatenate(parts.weights), sum(parts.biases and [np.concatenate(parts.biases)])
    return parts.weights[0]


def test_the_table_is_whole() -> None:
    assert set(vars(OPS)) == set(OP_NAMES)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_runs_over_numpy(family: str, tmp_path: Path) -> None:
    path = make_checkpoint(family, tmp_path)
    tokens = random_tokens(60)
    model, source = model_of(path, 128), open_checkpoint(path)
    tree = model.weights()
    weights = fill(tree, {path: bound(leaf, source) for path, leaf in leaves(tree)})
    inputs = StepInputs(
        token_ids_T=tokens.numpy(),
        positions_T=model.positions(np.arange(len(tokens), dtype=np.int32)),
        plan=None,
    )
    hidden, _ = model.forward(OPS, weights, inputs, [None] * len(model.attention_specs()))
    logits = model.logits(OPS, weights, hidden)
    assert isinstance(logits, np.ndarray)
    assert float((torch.from_numpy(logits) - our_logits(path, tokens)).abs().max()) < 1e-4
