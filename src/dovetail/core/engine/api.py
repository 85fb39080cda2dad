"""What the server and the command line see of an engine: one asynchronous contract.

``AsyncEngine`` implements it over an engine process; tests implement it with a few lines.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

import msgspec

from dovetail.core.request import (
    FinishReason,
    PromptTokens,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from dovetail.core.tokenizer import Tokenizer

__all__ = [
    "CompletionDelta",
    "EngineClient",
    "EngineState",
    "EngineStats",
    "EngineStatus",
    "ModelInfo",
    "RequestDelta",
]

EngineState = Literal["loading", "ready", "draining", "restarting", "dead"]


class CompletionDelta(msgspec.Struct, kw_only=True):
    """What is new in one completion. The text never ends inside a character or a stop string."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    """One entry per token of ``token_ids``, the chosen token first; None if not asked for."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    cumulative_logprob: float | None = None
    """Of all its tokens; only for the outcome of a beam search, whose tokens come at once."""


class RequestDelta(msgspec.Struct, kw_only=True):
    """What is new in one request since the delta before it."""

    completions: list[CompletionDelta]
    finished: bool
    """All completions have ended; no further delta follows."""
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """Once, in the first delta, if asked for: one entry per prompt token, None for the first."""


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    """Facts about the served model; known before the engine is ready."""

    name: str
    """The model as the user named it."""
    path: str
    vocab_size: int
    """Width of the logits: token ids must be below it."""
    max_model_len: int
    """The most tokens in one sequence. Before the engine is ready: the upper bound."""
    eos_token_ids: list[int]
    default_params: SamplingParams
    """``generation_config.json`` applied over Dovetail's defaults."""
    max_logprobs: int = 20
    """The most alternatives per token that a request may ask for."""
    features: frozenset[str] = frozenset()
    """What the platform can do: ``Capabilities.features``. Empty before the engine is ready."""


class EngineStatus(msgspec.Struct, frozen=True, kw_only=True):
    """Whether requests can be served now."""

    state: EngineState
    reason: str = ""
    """Why it is not ready, in one line; while loading, how far it is."""


class EngineStats(msgspec.Struct, kw_only=True, array_like=True):
    """Counters since start, and gauges of now. Sent by the engine with each message."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    """Blocks that no request refers to, cached prefixes included."""
    block_size: int = 0
    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens looked up."""
    prefix_cache_hits: int = 0
    """Prompt tokens found."""
    num_restarts: int = 0
    num_drafts: int = 0
    """Times that tokens were guessed for a sequence."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    """Of the guessed tokens, those that were right."""


class EngineClient(Protocol):
    """An engine that serves one model. All methods belong to one event loop."""

    info: ModelInfo
    tokenizer: Tokenizer | None
    """None with ``skip_tokenizer_init``: prompts must be token ids, answers are token ids."""

    @property
    def status(self) -> EngineStatus:
        """Whether requests can be served now."""
        ...

    @property
    def stats(self) -> EngineStats:
        """The latest figures."""
        ...

    def check_open(self, *, num_sequences: int = 1, num_tokens: int = 1) -> None:
        """Raise what ``stream`` would raise now for a request of this size, before it is parsed.

        Raises:
            OverloadedError: Not now: loading, draining, or the queue is full.
            EngineDeadError: The engine ended and could not be brought back.
        """
        ...

    def stream(
        self,
        prompt: PromptTokens,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> AsyncIterator[RequestDelta]:
        """Generate; yields what is new as it comes. Closing the iterator aborts the request.

        ``timeout``: seconds from this call in which the request must end, wherever it is: in the
        queue, running, or between two engine processes.

        Raises:
            RequestError: The request cannot be served (too long, token id out of range).
            OverloadedError: Not now: loading, draining, or the queue is full.
            RequestFailedError: The engine gave this request up; others go on.
            RequestTimeoutError: ``timeout`` has passed; what was yielded before stands.
            EngineDeadError: The engine ended and could not be brought back.
        """
        ...

    def generate(
        self,
        prompt: PromptTokens,
        params: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        timeout: float | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """As ``stream``, but each output holds everything so far."""
        ...

    async def debug_state(self) -> dict[str, Any]:
        """All that the engine keeps, as plain data; for people, and without a fixed form."""
        ...

    async def drain(self, timeout: float) -> None:
        """Take no new requests; return when the running ones are done or after ``timeout`` s."""
        ...

    async def close(self) -> None:
        """Abort what is left and end the engine process."""
        ...
