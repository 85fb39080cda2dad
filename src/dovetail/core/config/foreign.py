"""Arguments that vLLM users pass and that mean nothing here: which values change nothing."""

from __future__ import annotations

from typing import Any

__all__ = ["FOREIGN", "SWITCHES", "judge_foreign"]

_ANYTHING = object()
_ONE_DEVICE = "this version runs on one device"
_EMPTY: tuple[Any, ...] = (None, False, 0, "", {}, [], ())

FOREIGN: dict[str, tuple[Any, str]] = {
    "pipeline_parallel_size": ((None, 1), _ONE_DEVICE),
    "data_parallel_size": ((None, 1), _ONE_DEVICE),
    "decode_context_parallel_size": ((None, 1), _ONE_DEVICE),
    "enable_expert_parallel": (_EMPTY, _ONE_DEVICE),
    "distributed_executor_backend": ((None, "mp", "uni"), _ONE_DEVICE),
    "worker_cls": ((None, "auto"), "platforms bring their own runner"),
    "enforce_eager": (_ANYTHING, "the platform decides whether steps are captured"),
    "compilation_config": (_ANYTHING, "the platform decides what is compiled"),
    "optimization_level": (_ANYTHING, "the platform decides what is compiled"),
    "max_seq_len_to_capture": (_ANYTHING, "the platform decides whether steps are captured"),
    "disable_custom_all_reduce": (_ANYTHING, _ONE_DEVICE),
    "swap_space": (_ANYTHING, "preempted requests are computed again, never swapped"),
    "preemption_mode": (_ANYTHING, "preempted requests are computed again"),
    "num_scheduler_steps": ((None, 1), "async_scheduling serves this purpose"),
    "use_v2_block_manager": (_ANYTHING, "there is one block manager"),
    "max_parallel_loading_workers": (_ANYTHING, "weights are read in order"),
    "use_tqdm_on_load": (_ANYTHING, "progress shows where there is a terminal"),
    "disable_log_requests": (_ANYTHING, "requests are not logged"),
    "enable_log_requests": (_EMPTY, "requests are not logged"),
    "disable_async_output_proc": (_ANYTHING, "async_scheduling serves this purpose"),
    "logprobs_mode": ((None, "raw_logprobs"), "only raw_logprobs exists"),
    "revision": (_EMPTY, "only the newest revision is fetched; name the folder of another one"),
    "code_revision": (_EMPTY, "name the folder of another revision"),
    "tokenizer_revision": (_EMPTY, "name the folder of another revision"),
    "download_dir": (_EMPTY, "set HF_HUB_CACHE to the folder for downloads"),
    "hf_token": (_EMPTY, "set HF_TOKEN, or run `hf auth login`"),
    "hf_config_path": (_EMPTY, "config.json is read from the model's folder"),
    "hf_overrides": (_EMPTY, "edit config.json in the model's folder"),
    "rope_scaling": (_EMPTY, "edit config.json in the model's folder"),
    "rope_theta": (_EMPTY, "edit config.json in the model's folder"),
    "override_generation_config": (_EMPTY, "give sampling parameters with each request"),
    "logits_processors": (_EMPTY, "custom logits processors are not supported by this version"),
    "enable_lora": (_EMPTY, "LoRA adapters are not supported by this version"),
    "max_loras": (_ANYTHING, "LoRA adapters are not supported by this version"),
    "max_lora_rank": (_ANYTHING, "LoRA adapters are not supported by this version"),
    "speculative_model": (_EMPTY, "name it in speculative_config"),
    "num_speculative_tokens": (_EMPTY, "set it in speculative_config"),
    "kv_transfer_config": (_EMPTY, "KV transfer is not supported by this version"),
    "cpu_offload_gb": (_EMPTY, "weights are not offloaded by this version"),
    "calculate_kv_scales": (_EMPTY, "KV cache scales are not supported by this version"),
    "enable_sleep_mode": (_EMPTY, "sleep is not supported by this version"),
    "enable_prompt_embeds": (_EMPTY, "prompts are text or token ids"),
    "disable_sliding_window": (_EMPTY, "a sliding window is part of the model"),
    "disable_cascade_attn": (_ANYTHING, "the attention backend decides"),
    "limit_mm_per_prompt": (_ANYTHING, "models take text only"),
    "mm_processor_kwargs": (_ANYTHING, "models take text only"),
    "allowed_local_media_path": (_EMPTY, "models take text only"),
    "runner": ((None, "auto", "generate"), "models generate text only"),
    "task": ((None, "auto", "generate"), "models generate text only"),
    "convert": ((None, "auto", "none"), "models generate text only"),
    "guided_decoding_backend": (_ANYTHING, "there is one backend"),
    "structured_outputs_config": (_ANYTHING, "there is one backend"),
}
"""Each argument with the values that change nothing, and why any other one is refused."""

SWITCHES = frozenset(
    {
        "calculate_kv_scales",
        "disable_async_output_proc",
        "disable_cascade_attn",
        "disable_custom_all_reduce",
        "disable_log_requests",
        "disable_sliding_window",
        "enable_expert_parallel",
        "enable_log_requests",
        "enable_lora",
        "enable_prompt_embeds",
        "enable_sleep_mode",
        "enforce_eager",
        "use_tqdm_on_load",
        "use_v2_block_manager",
    }
)
"""Those that are flags without a value on the command line."""


def judge_foreign(name: str, value: Any) -> tuple[bool, str] | None:
    """Whether an argument of vLLM's may be ignored, and why; None if vLLM has no such argument."""
    entry = FOREIGN.get(name)
    if entry is None:
        return None
    harmless, reason = entry
    return harmless is _ANYTHING or _is_one_of(value, harmless), reason


def _is_one_of(value: Any, allowed: tuple[Any, ...]) -> bool:
    return any(type(value) is type(item) and value == item for item in allowed) or (
        isinstance(value, float) and value in allowed
    )
