"""Runs a model definition on whole sequences: torch reference ops, dense attention, no cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from dovetail.core.contracts.attention import AttentionSpec
from dovetail.core.contracts.model import Constant, Linear, Model, StepInputs
from dovetail.core.contracts.ops import OpTable
from dovetail.core.models.registry import find_model
from dovetail.core.models.weights import (
    Leaf,
    Source,
    align,
    assemble,
    check,
    fill,
    leaves,
    needs,
    open_checkpoint,
)
from dovetail.platforms.torch.dtypes import from_numpy
from dovetail.platforms.torch.ops import DenseLinear, references


def config_of(path: Path) -> dict[str, Any]:
    return json.loads((path / "config.json").read_text())


def model_of(path: Path, max_model_len: int) -> Model:
    config = config_of(path)
    family = find_model(config["architectures"])
    assert family is not None
    return family.from_config(config, max_model_len=max_model_len)


def bind(model: Model, source: Source, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Weights as a runner binds them, all in one dtype but for tables."""

    def bound(leaf: Leaf) -> Any:
        parts = assemble(leaf, source)
        weights = [from_numpy(array) for array in parts.weights]
        if isinstance(leaf, Linear):
            biases = [from_numpy(array).to(dtype) for array in parts.biases]
            weight = torch.cat(weights).to(dtype)
            return DenseLinear(weight, torch.cat(biases) if biases else None)
        return weights[0] if isinstance(leaf, Constant) else weights[0].to(dtype)

    tree = model.weights()
    return fill(tree, {path: bound(leaf) for path, leaf in leaves(tree)})


def dense_attention(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    v_TKE: torch.Tensor,
    cache: Any,
    plan: object,
    spec: AttentionSpec,
) -> tuple[torch.Tensor, Any]:
    """One sequence, all its positions at once."""
    assert q_THE.shape[1:] == (spec.num_heads, spec.head_size)
    assert k_TKE.shape[1:] == v_TKE.shape[1:] == (spec.num_kv_heads, spec.head_size)
    group = spec.num_heads // spec.num_kv_heads
    k, v = (x.repeat_interleave(group, dim=1).float() for x in (k_TKE, v_TKE))
    scores = torch.einsum("the,she->hts", q_THE.float(), k) * spec.scale
    if spec.soft_cap is not None:
        scores = spec.soft_cap * torch.tanh(scores / spec.soft_cap)
    distance = torch.arange(len(q_THE))[:, None] - torch.arange(len(q_THE))
    hidden = distance < 0
    if spec.window is not None:
        hidden |= distance >= spec.window
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
    return torch.einsum("hts,she->the", weights, v).to(q_THE.dtype), cache


@torch.no_grad()
def logits_of(
    model: Model, source: Source, token_ids: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(T, V) of one sequence (T,)."""
    ops = OpTable(references()).bind()
    ops.attention = dense_attention
    weights = bind(model, source, dtype)
    positions = model.positions(torch.arange(len(token_ids), dtype=torch.int32).numpy())
    inputs = StepInputs(
        token_ids_T=token_ids.int(), positions_T=torch.from_numpy(positions), plan=None
    )
    specs = model.attention_specs()
    hidden, caches = model.forward(ops, weights, inputs, [spec.layer for spec in specs])
    assert caches == list(range(len(specs)))
    return model.logits(ops, weights, hidden)


def our_logits(path: Path, token_ids: torch.Tensor, *, max_model_len: int = 512) -> torch.Tensor:
    model = model_of(path, max_model_len)
    source = align(open_checkpoint(path), model.weights())
    check(needs(model.weights()), source, model.ignored)
    return logits_of(model, source, token_ids)


@torch.no_grad()
def transformers_logits(path: Path, token_ids: torch.Tensor) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
    return model(token_ids[None].long(), use_cache=False).logits[0]


def random_tokens(length: int, vocab: int = 384) -> torch.Tensor:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(1))
