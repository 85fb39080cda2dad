"""Wishes that are understood but cannot be met yet: refused by name, never ignored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dovetail.core.errors import RequestError
from dovetail.core.server.protocol import ChatCompletionRequest, GenerationRequest

__all__ = ["refuse_unsupported"]


def _never(value: Any) -> bool:
    return False


def _empty(value: Any) -> bool:
    return not value


_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("suffix", lambda text: text == "", "filling in the middle needs a model that is made for it"),
    ("thinking_token_budget", _never, "a budget for reasoning is not available yet"),
    ("functions", _empty, "functions were replaced by tools"),
    ("function_call", lambda v: v in ("none", "auto"), "functions were replaced by tools"),
    ("audio", _never, "this model makes text, not audio"),
    ("modalities", lambda v: set(v) <= {"text"}, 'only ["text"] is possible'),
    ("mm_processor_kwargs", _empty, "this model takes text only"),
)
_CHAT_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("echo", _empty, "echo belongs to /v1/completions"),
)


def refuse_unsupported(request: GenerationRequest) -> None:
    """Check every field that has a meaning but no implementation.

    Raises:
        RequestError: Names the field and says what is possible instead.
    """
    rules = _RULES + _CHAT_RULES if isinstance(request, ChatCompletionRequest) else _RULES
    for name, accepts, reason in rules:
        value = getattr(request, name, None)
        if value is not None and not accepts(value):
            raise RequestError(f"{name}: {reason}.", param=name, code="unsupported")
    if request.stream and request.use_beam_search:
        raise RequestError(
            "The outcome of a beam search is known at its end only; leave out stream.",
            param="use_beam_search",
        )
    if request.stream and (request.best_of or 1) > (request.n or 1):
        raise RequestError(
            "The best completions are known at the end only: with stream, best_of cannot be"
            " greater than n.",
            param="best_of",
        )
    if request.stream_options is not None and not request.stream:
        raise RequestError("stream_options needs stream: true.", param="stream_options")
    if request.stream and request.prompt_logprobs is not None:
        raise RequestError(
            "prompt_logprobs cannot be streamed; leave out stream.", param="prompt_logprobs"
        )
