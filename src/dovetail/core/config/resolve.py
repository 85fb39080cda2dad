"""Intent, model and platform in; every decision with its reason out. Pure."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from dovetail.core.config.checkpoint import ModelFacts
from dovetail.core.config.model_choice import (
    PlatformView,
    decide_model,
    decide_speculation,
    tensor_parallel,
)
from dovetail.core.config.resolved import ResolvedConfig
from dovetail.core.config.schema import EngineConfig
from dovetail.core.errors import ConfigError, PluginError, UnsupportedError

if TYPE_CHECKING:
    from dovetail.core.contracts.platform import Capabilities

__all__ = ["PlatformView", "resolve"]


def resolve(
    intent: EngineConfig,
    facts: ModelFacts,
    platform: PlatformView,
    native: bool,
    *,
    known: Collection[str] = (),
    schemes: Collection[str] = (),
    allow_long: bool = False,
    draft: ModelFacts | None = None,
) -> ResolvedConfig:
    """Decide every setting.

    Args:
        intent: What the user wants.
        facts: What the checkpoint is.
        platform: What the hardware can do, and the changes it needs.
        native: Whether Dovetail has the checkpoint's architecture.
        known: The architectures that it has, for messages.
        schemes: The quantization schemes that are installed.
        allow_long: Let ``max_model_len`` exceed the checkpoint's limit.
        draft: The draft model that ``speculative_config`` names.

    Raises:
        ConfigError: Two wishes contradict each other or the checkpoint.
        UnsupportedError: The platform cannot do what is wished.
        CheckpointError: There are no weights to load.
        PluginError: The platform asked for a change that makes no sense.
    """
    reasons: dict[str, str] = {}
    decided = decide_model(intent, facts, platform, native, known, schemes, reasons)
    decided |= _decide_dtypes(intent, facts, platform, reasons)
    decided |= _decide_sizes(intent, facts, platform, allow_long, reasons)
    decided |= decide_speculation(intent, draft, platform, known)
    resolved = _assemble(intent, facts, platform, decided, reasons)
    resolved = _apply(platform, resolved)
    _check(resolved)
    return resolved


def _assemble(
    intent: EngineConfig,
    facts: ModelFacts,
    platform: PlatformView,
    decided: dict[str, Any],
    reasons: dict[str, str],
) -> ResolvedConfig:
    return ResolvedConfig(
        model=facts.name,
        served_model_names=intent.served_model_name or (facts.name,),
        model_path=facts.path,
        hf_config=facts.hf_config,
        trust_remote_code=intent.trust_remote_code,
        tokenizer_path=facts.tokenizer_path,
        tokenizer_mode=intent.tokenizer_mode,  # type: ignore[arg-type]
        skip_tokenizer_init=intent.skip_tokenizer_init,
        vocab_size=facts.vocab_size,
        eos_token_ids=facts.eos_token_ids,
        default_params=facts.default_params,
        platform=platform.name,
        attention_backend=intent.attention_backend,
        tensor_parallel_size=tensor_parallel(intent, platform),
        threads=intent.threads,
        options=dict(intent.options),
        seed=intent.seed,
        max_num_queued_requests=intent.max_num_queued_requests,
        max_num_queued_tokens=intent.max_num_queued_tokens,
        num_blocks=intent.num_gpu_blocks_override,
        kv_cache_memory_bytes=intent.kv_cache_memory_bytes,
        memory_utilization=intent.gpu_memory_utilization,
        enable_prefix_caching=intent.enable_prefix_caching,
        enable_chunked_prefill=intent.enable_chunked_prefill,
        mixed_batches=platform.capabilities.mixed_batches,
        scheduling_policy=intent.scheduling_policy,  # type: ignore[arg-type]
        priority_ageing_seconds=intent.priority_ageing_seconds,
        disable_log_stats=intent.disable_log_stats,
        reasons=reasons,
        **decided,
    )


def _decide_dtypes(
    intent: EngineConfig, facts: ModelFacts, platform: PlatformView, reasons: dict[str, str]
) -> dict[str, Any]:
    able, slow = platform.capabilities.dtypes, platform.capabilities.slow_dtypes
    dtype = intent.dtype
    if dtype == "auto":
        dtype = facts.dtype if facts.dtype in able and facts.dtype not in slow else able[0]
        stored = f"the checkpoint is {facts.dtype}" if facts.dtype else "the checkpoint names none"
        is_slow = facts.dtype in slow
        why = f"is much faster in {dtype}" if is_slow else f"prefers {dtype}"
        beyond = "" if dtype == facts.dtype else f", platform {platform.name} {why}"
        reasons["dtype"] = stored + beyond
    elif dtype not in able:
        raise UnsupportedError(
            f"dtype={dtype}: platform {platform.name} computes in {', '.join(able)}"
        )
    return {"dtype": dtype, "kv_dtype": _kv_dtype(intent, dtype, platform, reasons)}


def _kv_dtype(
    intent: EngineConfig, dtype: str, platform: PlatformView, reasons: dict[str, str]
) -> str:
    able = platform.capabilities.kv_dtypes
    same = {*able, *(platform.capabilities.dtypes if "auto" in able else ())}
    wish = intent.kv_cache_dtype
    if wish == "auto":
        if dtype in same:
            return dtype
        reasons["kv_dtype"] = f"platform {platform.name} keeps no {dtype} cache"
        return able[0]
    if wish not in same:
        raise UnsupportedError(
            f"kv_cache_dtype={wish}: platform {platform.name} keeps {', '.join(able)}"
        )
    return wish


def _decide_sizes(
    intent: EngineConfig,
    facts: ModelFacts,
    platform: PlatformView,
    allow_long: bool,
    reasons: dict[str, str],
) -> dict[str, Any]:
    able = platform.capabilities
    if intent.block_size is not None and intent.block_size not in able.block_sizes:
        raise UnsupportedError(
            f"block_size={intent.block_size}: platform {platform.name} has"
            f" {', '.join(map(str, able.block_sizes))}"
        )
    max_model_len = _max_model_len(intent, facts, allow_long, reasons)
    max_num_seqs = intent.max_num_seqs or able.max_num_seqs
    tokens = intent.max_num_batched_tokens
    if intent.max_num_seqs is None and tokens is not None and tokens < max_num_seqs:
        max_num_seqs = tokens
        reasons["max_num_seqs"] = f"a step has {tokens} tokens, at least one per request"
    if tokens is None:
        tokens = _default_batched_tokens(intent, able, max_num_seqs, max_model_len, reasons)
    use_async = intent.async_scheduling
    return {
        "max_model_len": max_model_len,
        "max_model_len_is_given": intent.max_model_len is not None,
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": tokens,
        "block_size": intent.block_size or able.block_sizes[0],
        "async_scheduling": able.async_steps if use_async is None else use_async,
    }


def _max_model_len(
    intent: EngineConfig, facts: ModelFacts, allow_long: bool, reasons: dict[str, str]
) -> int:
    wish = intent.max_model_len
    if wish is None:
        return facts.max_model_len
    if wish > facts.max_model_len:
        if not allow_long:
            raise ConfigError(
                f"max_model_len={wish}: {facts.name} is made for {facts.max_model_len} tokens;"
                " DOVETAIL_ALLOW_LONG_MAX_MODEL_LEN=1 allows more, at the price of wrong answers"
            )
        reasons["max_model_len"] = (
            f"beyond the model's {facts.max_model_len}, as DOVETAIL_ALLOW_LONG_MAX_MODEL_LEN allows"
        )
    return wish


def _default_batched_tokens(
    intent: EngineConfig,
    able: Capabilities,
    max_num_seqs: int,
    max_model_len: int,
    reasons: dict[str, str],
) -> int:
    tokens = able.max_num_batched_tokens
    if not intent.enable_chunked_prefill and tokens < max_model_len:
        tokens = max_model_len
        reasons["max_num_batched_tokens"] = "without chunked prefill, a step takes a whole prompt"
    if tokens < max_num_seqs:
        tokens = max_num_seqs
        reasons["max_num_batched_tokens"] = "a step takes at least one token per request"
    return tokens


def _apply(platform: PlatformView, resolved: ResolvedConfig) -> ResolvedConfig:
    """Let the platform change settings, each with its reason."""
    settings = {f.name: getattr(resolved, f.name) for f in dataclasses.fields(resolved)}
    settings.pop("reasons")
    changes: dict[str, Any] = {}
    reasons = dict(resolved.reasons)
    for change in platform.adjust(settings):
        if change.field not in settings:
            raise PluginError(
                f"platform {platform.name} adjusts {change.field!r}, which is no setting;"
                f" there are {', '.join(settings)}"
            )
        if change.value != settings[change.field]:
            changes[change.field] = change.value
            reasons[change.field] = f"{change.reason} (platform {platform.name})"
    return dataclasses.replace(resolved, **changes, reasons=reasons)


def _check(resolved: ResolvedConfig) -> None:
    """Refuse settings that contradict each other."""
    tokens, seqs = resolved.max_num_batched_tokens, resolved.max_num_seqs
    if tokens < seqs:
        raise ConfigError(
            f"max_num_batched_tokens={tokens} is below max_num_seqs={seqs}, and each running"
            " request needs a token per step: raise the first or lower the second"
        )
    if not resolved.enable_chunked_prefill and tokens < resolved.max_model_len:
        raise ConfigError(
            f"enable_chunked_prefill=False needs max_num_batched_tokens ({tokens}) of at least"
            f" max_model_len ({resolved.max_model_len}): raise the first, lower the second, or"
            " leave chunked prefill on"
        )
