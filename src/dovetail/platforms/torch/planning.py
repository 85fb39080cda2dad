"""What a model will take and which attention serves it, as far as its config says."""

from __future__ import annotations

from dataclasses import replace

from dovetail.core.contracts.attention import AttentionNeed
from dovetail.core.contracts.runner import RunnerConfig, RunnerPlan
from dovetail.core.errors import UnsupportedError
from dovetail.core.models.demand import (
    attention_need,
    block_bytes,
    widest_layer,
    widest_window,
)
from dovetail.core.models.load import define, weight_bytes
from dovetail.core.plugins.attention import AttentionChoice, choose_attention
from dovetail.core.types import ITEM_SIZE
from dovetail.platforms.torch.loading import chosen_kernels, chosen_scheme, op_table
from dovetail.platforms.torch.platform import TorchPlatform

__all__ = ["LOGIT_ROWS", "choose_backend", "plan_runner", "step_bytes"]

LOGIT_ROWS = 256
"""Rows of logits made at a time for prompts: bounds the memory of a long prompt's."""

_HELD = 6
"""Arrays as wide as the widest layer that are held at once, at most: a step has three at a time
(what goes into its widest layer and what comes out, the residual), and where one as long is
recorded, the record keeps as much for itself."""


def choose_backend(
    platform: TorchPlatform, config: RunnerConfig, need: AttentionNeed
) -> AttentionChoice:
    """The platform's first backend that serves the need, or the one that the user insists on."""
    return choose_attention(platform.attention_backends(), need, insisted=config.attention_backend)


def step_bytes(config: RunnerConfig, vocab_size: int) -> int:
    """An upper bound of the arrays that a step holds at once, without weights and cache."""
    item = ITEM_SIZE[config.dtype]
    width = widest_layer(config, vocab_size)
    activations = config.max_num_batched_tokens * width * item * _HELD
    rows = max(config.max_num_seqs * (1 + config.max_drafts), LOGIT_ROWS)
    return activations + rows * vocab_size * (item + 8)


def plan_runner(platform: TorchPlatform, config: RunnerConfig) -> RunnerPlan:
    """Of the served model, and of its draft model if it has one.

    Raises:
        UnsupportedError: The transformers library's code is to run one of them.
    """
    plan = _plan_model(platform, config)
    if config.draft is None:
        return plan
    draft = _plan_model(platform, config.draft)
    return replace(
        plan,
        weight_bytes=plan.weight_bytes + draft.weight_bytes,
        bytes_per_block=plan.bytes_per_block + draft.bytes_per_block,
        window=widest_window([plan.window, draft.window]),
    )


def _plan_model(platform: TorchPlatform, config: RunnerConfig) -> RunnerPlan:
    scheme = chosen_scheme(config)
    if config.model_impl == "transformers":
        raise UnsupportedError(
            "What a model of the transformers library needs is known only once its weights are"
            " read: its own code says how it attends. Plans are for native models."
        )
    model = define(config)
    need = attention_need(config, model.attention_specs())
    choice = choose_backend(platform, config, need)
    return RunnerPlan(
        weight_bytes=weight_bytes(model, config, scheme),
        step_bytes=step_bytes(config, model.vocab_size),
        bytes_per_block=block_bytes(choice.backend, need),
        window=need.window,
        choices={
            "attention": choice.describe(),
            **chosen_kernels(op_table(platform), config, scheme),
        },
    )
