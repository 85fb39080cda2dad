"""From a request's fields to the parameters of each of its prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from dovetail.core.engine.api import ModelInfo
from dovetail.core.engine.intake import num_logprobs
from dovetail.core.errors import ContextLengthError, RequestError
from dovetail.core.request import SamplingParams
from dovetail.core.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)

__all__ = [
    "check_token_ids",
    "context_overflow",
    "fit_to_context",
    "for_chat",
    "for_completion",
    "only_echoes",
]

_COPIED = (
    "n",
    "best_of",
    "use_beam_search",
    "min_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "bad_words_token_ids",
    "logits_processors",
    "skip_special_tokens",
    "spaces_between_special_tokens",
)
_PRIORITIES = 1 << 31


def for_completion(request: CompletionRequest, info: ModelInfo) -> SamplingParams:
    """The parameters of a text completion; ``max_tokens`` is None if the client set no limit.

    Raises:
        RequestError: A value is outside its range.
    """
    logprobs = num_logprobs("logprobs", request.logprobs, info)
    prompt_logprobs = num_logprobs("prompt_logprobs", request.prompt_logprobs, info)
    if request.echo and logprobs is not None:
        prompt_logprobs = max(logprobs, prompt_logprobs or 0)
    given: dict[str, Any] = {
        "logprobs": logprobs,
        "prompt_logprobs": prompt_logprobs,
        "max_tokens": 1 if only_echoes(request) else request.max_tokens,
    }
    return _build(request, info, given)


def only_echoes(request: CompletionRequest) -> bool:
    """Whether the client wants its prompt scored and nothing generated."""
    return bool(request.echo) and request.max_tokens == 0


def for_chat(request: ChatCompletionRequest, info: ModelInfo) -> SamplingParams:
    """The parameters of a chat completion; ``max_tokens`` is None if the client set no limit.

    Raises:
        RequestError: A value is outside its range.
    """
    if request.top_logprobs and not request.logprobs:
        raise RequestError("top_logprobs needs logprobs: true.", param="top_logprobs")
    top = num_logprobs("top_logprobs", request.top_logprobs, info)
    limit = request.max_completion_tokens
    given: dict[str, Any] = {
        "logprobs": (top or 0) if request.logprobs else None,
        "prompt_logprobs": num_logprobs("prompt_logprobs", request.prompt_logprobs, info),
        "max_tokens": request.max_tokens if limit is None else limit,
    }
    if limit is None:
        return _build(request, info, given)
    return _build(request, info, given, {"max_tokens": "max_completion_tokens"})


def _build(
    request: GenerationRequest,
    info: ModelInfo,
    given: dict[str, Any],
    names: Mapping[str, str] = MappingProxyType({}),
) -> SamplingParams:
    """Apply the request over the model's defaults; ``names`` are the request's own for fields.

    A beam search does not draw: the model's defaults for drawing have no meaning for it.
    """
    _check_request_fields(request, info)
    defaults = info.default_params
    if request.use_beam_search:
        defaults = SamplingParams(max_tokens=defaults.max_tokens)
        if request.length_penalty is not None:
            given["length_penalty"] = request.length_penalty
    for name in _COPIED:
        value = getattr(request, name)
        if value is not None:
            given[name] = value
    try:
        return msgspec.structs.replace(defaults, **given)
    except RequestError as exc:
        param = names.get(exc.param or "", exc.param)
        raise RequestError(str(exc), param=param, code=exc.code) from None


def _check_request_fields(request: GenerationRequest, info: ModelInfo) -> None:
    """What is about the request, not about sampling, and what only the model can decide."""
    if request.priority is not None and not -_PRIORITIES <= request.priority < _PRIORITIES:
        raise RequestError("priority must be a 32-bit integer.", param="priority")
    if request.cache_salt is not None and not 0 < len(request.cache_salt) <= 256:
        raise RequestError("cache_salt must have 1 to 256 characters.", param="cache_salt")
    check_token_ids(request.stop_token_ids or (), info, "stop_token_ids")
    check_token_ids(request.allowed_token_ids or (), info, "allowed_token_ids")
    check_token_ids(request.logit_bias or (), info, "logit_bias")
    for word in request.bad_words_token_ids or ():
        check_token_ids(word, info, "bad_words_token_ids")


def check_token_ids(ids: Iterable[int], info: ModelInfo, param: str) -> None:
    """Refuse ids that the model's logits do not have.

    Raises:
        RequestError: Names the first such id.
    """
    for token_id in (min(ids, default=0), max(ids, default=0)):
        if not 0 <= token_id < info.vocab_size:
            raise RequestError(
                f"{param}: token id {token_id!r:.40} is outside the vocabulary"
                f" (0 to {info.vocab_size - 1}).",
                param=param,
            )


def fit_to_context(
    params: SamplingParams,
    num_prompt_tokens: int,
    info: ModelInfo,
    *,
    default: int | None,
    param: str,
) -> SamplingParams:
    """Settle ``max_tokens`` for one prompt.

    Args:
        params: The request's parameters; ``max_tokens`` is None if the client set no limit.
        num_prompt_tokens: Length of the prompt.
        info: The model, with its context length.
        default: New tokens if the client set no limit; None means the rest of the context.
        param: The field that holds the prompt, for the error.

    Raises:
        ContextLengthError: Prompt and completion do not fit.
    """
    room = info.max_model_len - num_prompt_tokens
    wanted = params.max_tokens
    if room < max(wanted or 1, params.min_tokens, 1):
        raise context_overflow(info, num_prompt_tokens, wanted, param)
    if wanted is not None:
        return params
    wanted = room if default is None else min(max(default, params.min_tokens), room)
    return msgspec.structs.replace(params, max_tokens=wanted)


def context_overflow(
    info: ModelInfo, num_prompt_tokens: int, wanted: int | None, param: str
) -> ContextLengthError:
    """The refusal that clients recognise by its first words."""
    message = f"This model's maximum context length is {info.max_model_len} tokens. However, "
    if wanted is None:
        message += (
            f"the prompt has {num_prompt_tokens} tokens, which leaves no room for an answer."
            " Shorten the prompt."
        )
    else:
        message += (
            f"you asked for {num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the"
            f" prompt, {wanted} for the completion). Shorten the prompt or the completion."
        )
    return ContextLengthError(message, param=param)
