"""What was decided: every setting of an engine, with the reasons."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dovetail.core.config.speculative import SpeculativeConfig
from dovetail.core.request import SamplingParams

if TYPE_CHECKING:
    from dovetail.core.contracts.runner import RunnerConfig

__all__ = ["CachePlan", "DraftModel", "ResolvedConfig"]


@dataclass(frozen=True, kw_only=True)
class CachePlan:
    """The KV cache that fits."""

    num_blocks: int
    """Blocks that can be given out; the one that pads block tables comes on top."""
    max_model_len: int
    """The most tokens in one sequence; smaller than resolved where the memory is short."""
    reason: str
    """How it was decided, in one line."""


@dataclass(frozen=True, kw_only=True)
class DraftModel:
    """The small model that guesses what the served one will say."""

    path: Path
    hf_config: dict[str, Any]
    model_impl: Literal["native", "transformers"]


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig:
    """Every decided setting. Made by :func:`resolve`, changed by nobody."""

    model: str
    """The model as the user named it."""
    served_model_names: tuple[str, ...]
    """Names that clients may use; at least one, the first of which answers carry."""
    model_path: Path
    hf_config: dict[str, Any]
    architecture: str
    model_impl: Literal["native", "transformers"]
    load_format: Literal["safetensors", "dummy"]
    trust_remote_code: bool
    tokenizer_path: Path
    tokenizer_mode: Literal["auto", "slow"]
    skip_tokenizer_init: bool
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    default_params: SamplingParams
    platform: str
    """Name of the platform."""
    dtype: str
    kv_dtype: str
    quantization: str | None
    attention_backend: str | None
    """The backend that the user insists on."""
    tensor_parallel_size: int
    """Devices that share every layer."""
    threads: int | None
    """Threads that compute; None leaves it to the platform."""
    options: dict[str, Any]
    deterministic: bool
    """Logits do not depend on what else is in a step, bit for bit."""
    seed: int
    max_model_len: int
    """The most tokens in one sequence, prompt and answer."""
    max_model_len_is_given: bool
    """The user set it: it must fit, and is never made smaller."""
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_queued_requests: int | None
    """Requests that may wait; None is no limit."""
    max_num_queued_tokens: int | None
    """Prompt tokens that may wait; None is no limit."""
    block_size: int
    """Positions per KV block."""
    num_blocks: int | None
    """Size of the KV cache in blocks, if the user set it."""
    kv_cache_memory_bytes: int | None
    """Size of the KV cache in bytes, if the user set it."""
    memory_utilization: float
    """Share of the available memory for the KV cache, in (0, 1]."""
    enable_prefix_caching: bool
    enable_chunked_prefill: bool
    mixed_batches: bool
    """Prefill and decode may share a step."""
    async_scheduling: bool
    """Prepare each step while the one before it runs."""
    scheduling_policy: Literal["fcfs", "priority"]
    priority_ageing_seconds: float | None
    """Seconds of waiting that are worth one priority; None: waiting changes nothing."""
    disable_log_stats: bool
    speculation: SpeculativeConfig | None = None
    draft: DraftModel | None = None
    """Set if ``speculation.method`` is ``draft_model``."""
    reasons: dict[str, str] = field(default_factory=dict)
    """Why a field is not simply what the user wished, by field name."""

    def runner_config(self) -> RunnerConfig:
        """The part that a runner needs."""
        from dovetail.core.contracts.runner import RunnerConfig

        options = dict(self.options)
        if self.threads is not None:
            options.setdefault("threads", self.threads)
        config = RunnerConfig(
            model_path=self.model_path,
            hf_config=self.hf_config,
            model_impl=self.model_impl,
            load_format=self.load_format,
            dtype=self.dtype,
            kv_dtype=self.kv_dtype,
            block_size=self.block_size,
            max_model_len=self.max_model_len,
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            attention_backend=self.attention_backend,
            quantization=self.quantization,
            deterministic=self.deterministic,
            seed=self.seed,
            trust_remote_code=self.trust_remote_code,
            options=options,
            tensor_parallel_size=self.tensor_parallel_size,
            max_drafts=self.speculation.num_speculative_tokens if self.speculation else 0,
        )
        if self.draft is None:
            return config
        draft = replace(
            config,
            model_path=self.draft.path,
            hf_config=self.draft.hf_config,
            model_impl=self.draft.model_impl,
            quantization=None,
        )
        return replace(config, draft=draft)

    def with_cache(self, plan: CachePlan) -> ResolvedConfig:
        """This configuration with the context length that fits the cache."""
        if plan.max_model_len == self.max_model_len:
            return self
        reasons = {**self.reasons, "max_model_len": plan.reason}
        return replace(self, max_model_len=plan.max_model_len, reasons=reasons)
