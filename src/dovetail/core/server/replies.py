"""What the server sends. Fields that are ``UNSET`` do not appear; None appears as null."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

__all__ = [
    "ChatChoice",
    "ChatChunk",
    "ChatChunkChoice",
    "ChatCompletion",
    "ChatDelta",
    "ChatLogprob",
    "ChatLogprobs",
    "ChatReplyMessage",
    "Completion",
    "CompletionChoice",
    "CompletionLogprobs",
    "Detokenized",
    "Health",
    "ModelCard",
    "ModelList",
    "PromptTokenDetails",
    "ReplyFunction",
    "ReplyToolCall",
    "Tokenized",
    "TokenizerInfo",
    "TopLogprob",
    "Usage",
    "Version",
]


class PromptTokenDetails(msgspec.Struct, kw_only=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int = 0
    """Found in the prefix cache."""


class Usage(msgspec.Struct, kw_only=True):
    """Token counts over all prompts and choices of a request."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokenDetails


class CompletionLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities in the form of /v1/completions: four lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of text before each token."""


class CompletionChoice(msgspec.Struct, kw_only=True):
    """One completion of one prompt, or what is new in it."""

    index: int
    """Number of the prompt times ``n``, plus number of the completion."""
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    """The stop string or token that ended it."""
    token_ids: list[int] | UnsetType = UNSET
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[Any] | UnsetType = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """The answer of /v1/completions, and each chunk of its stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET
    system_fingerprint: str


class TopLogprob(msgspec.Struct, kw_only=True):
    """A candidate for one position."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob, kw_only=True):
    """The token at one position, with its rivals."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(msgspec.Struct, kw_only=True):
    """Log-probabilities in the form of /v1/chat/completions."""

    content: list[ChatLogprob]
    refusal: None = None


class ReplyFunction(msgspec.Struct, kw_only=True):
    """Which function to call, and with what; in a chunk, what is new of it."""

    name: str | UnsetType = UNSET
    arguments: str
    """JSON text."""


class ReplyToolCall(msgspec.Struct, kw_only=True):
    """A call that the model makes."""

    index: int | UnsetType = UNSET
    """In chunks only."""
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: ReplyFunction


class ChatReplyMessage(msgspec.Struct, kw_only=True):
    """What the model said."""

    role: str
    content: str | None
    """null if it calls a tool instead."""
    refusal: str | None = None
    tool_calls: list[ReplyToolCall] | UnsetType = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    """One answer to a conversation."""

    index: int
    message: ChatReplyMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | UnsetType = UNSET


class ChatCompletion(msgspec.Struct, kw_only=True):
    """The answer of /v1/chat/completions."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: list[int] | UnsetType = UNSET
    prompt_logprobs: list[Any] | UnsetType = UNSET


class ChatDelta(msgspec.Struct, kw_only=True):
    """What is new in one answer."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ReplyToolCall] | UnsetType = UNSET


class ChatChunkChoice(msgspec.Struct, kw_only=True):
    """One answer in a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET
    token_ids: list[int] | UnsetType = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    """A chunk of a streamed chat completion."""

    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET
    system_fingerprint: str
    prompt_token_ids: list[int] | UnsetType = UNSET


class ModelCard(msgspec.Struct, kw_only=True):
    """One name under which the model is served."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "dovetail"
    root: str
    parent: str | None = None
    max_model_len: int
    permission: list[Any] = []


class ModelList(msgspec.Struct, kw_only=True):
    """The answer of GET /v1/models."""

    object: str = "list"
    data: list[ModelCard]


class Tokenized(msgspec.Struct, kw_only=True):
    """The answer of POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(msgspec.Struct, kw_only=True):
    """The answer of POST /detokenize."""

    prompt: str


class TokenizerInfo(msgspec.Struct, kw_only=True):
    """The answer of GET /tokenizer_info."""

    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    chat_template: str | None


class Health(msgspec.Struct, kw_only=True):
    """The answer of a probe."""

    status: str


class Version(msgspec.Struct, kw_only=True):
    """The answer of GET /version."""

    version: str
