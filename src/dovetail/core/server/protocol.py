"""What clients send: OpenAI's request bodies with the extensions that vLLM made common.

null means absent in every field, so every optional field is ``X | None``. Fields without
meaning here that clients do send are in ``IGNORED_FIELDS``; fields with a meaning that cannot
be honoured yet are declared, so that ``unsupported`` can refuse them by name.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

import msgspec

__all__ = [
    "IGNORED_FIELDS",
    "ChatCompletionRequest",
    "ChatMessage",
    "CompletionRequest",
    "ContentPart",
    "DetokenizeRequest",
    "GenerationRequest",
    "StreamOptions",
    "TemplateFields",
    "TokenizeRequest",
    "ToolCall",
    "ToolCallFunction",
]

IGNORED_FIELDS = frozenset(
    {
        "include_reasoning",
        "metadata",
        "moderation",
        "parallel_tool_calls",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
        "web_search_options",
    }
)
"""Accepted without a word: they do not change what is generated."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """Details of a stream."""

    include_usage: bool | None = None
    """End with a chunk that has token counts and no choices."""
    continuous_usage_stats: bool | None = None
    """Put token counts so far into every chunk."""
    include_obfuscation: bool | None = None


class GenerationRequest(msgspec.Struct, kw_only=True):
    """What completions and chat completions share."""

    model: str | None = None
    """One of the served names; absent: the first of them."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    n: int | None = None
    best_of: int | None = None
    """Generate this many and give the ``n`` likeliest; with beam search: beams to follow."""
    use_beam_search: bool | None = None
    length_penalty: float | None = None
    """For beam search; means nothing without it."""
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: dict[int, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    bad_words_token_ids: list[list[int]] | None = None
    logits_processors: dict[str, Any] | None = None
    """Installed processors to apply: name to argument."""
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None

    add_special_tokens: bool | None = None
    """Put what the model expects around a text; default: true for prompts, false for chats."""
    truncate_prompt_tokens: int | None = None
    """Keep only this many of the prompt's last tokens; -1: as many as the model can take."""
    priority: int | None = None
    """Smaller goes first, if the server schedules by priority."""
    cache_salt: str | None = None
    """Share cached prefixes only with requests of the same salt."""
    timeout: float | None = None
    """Seconds from arrival in which the answer must be complete; else the request ends with status
    504. The header ``X-Request-Timeout`` means the same, and this field goes before it."""
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    """Write tokens in log-probabilities as ``token_id:N``."""

    grammar: Any = None
    guided_choice: Any = None
    guided_grammar: Any = None
    guided_json: Any = None
    guided_regex: Any = None
    json_schema: Any = None
    response_format: Any = None
    structured_outputs: Any = None
    thinking_token_budget: int | None = None


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions."""

    prompt: str | list[str | int | list[int]]
    """A text, token ids, or a list of either."""
    echo: bool | None = None
    """Put the prompt, and its log-probabilities if asked for, before the completion."""
    logprobs: int | None = None
    """Log-probabilities of this many likeliest tokens and of the chosen one."""
    suffix: str | None = None


class ContentPart(msgspec.Struct, kw_only=True):
    """A piece of a message. Only text is understood today."""

    type: str
    text: str | None = None
    refusal: str | None = None


class ToolCallFunction(msgspec.Struct, kw_only=True):
    """A call that the model made: the name, and the arguments as JSON text."""

    name: str
    arguments: str | dict[str, Any] | None = None


class ToolCall(msgspec.Struct, kw_only=True):
    """A tool call in the history."""

    function: ToolCallFunction
    id: str | None = None
    type: str | None = None


class ChatMessage(msgspec.Struct, kw_only=True):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None


class TemplateFields(Protocol):
    """What decides how a conversation is laid out as a prompt."""

    tools: list[dict[str, Any]] | None
    documents: list[dict[str, Any]] | None
    chat_template: str | None
    chat_template_kwargs: dict[str, Any] | None
    add_generation_prompt: bool | None
    continue_final_message: bool | None
    reasoning_effort: str | None


class ChatCompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: int | None = None
    """Default: what the prompt leaves of the context."""
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: str | dict[str, Any] | None = None

    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Let the model go on in the last message instead of opening its own turn."""
    reasoning_effort: str | None = None

    audio: Any = None
    echo: bool | None = None
    function_call: Any = None
    functions: Any = None
    mm_processor_kwargs: Any = None
    modalities: list[str] | None = None


class TokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /tokenize: either a prompt or a conversation."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None

    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    """Let the model go on in the last message instead of opening its own turn."""
    reasoning_effort: str | None = None


class DetokenizeRequest(msgspec.Struct, kw_only=True):
    """POST /detokenize."""

    model: str | None = None
    tokens: list[int]
