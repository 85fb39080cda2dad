"""POST /v1/completions and /v1/chat/completions: from the request to the engine and back."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from dovetail.core.errors import RequestError
from dovetail.core.request import PromptTokens, SamplingParams
from dovetail.core.server.admission import attended
from dovetail.core.server.answers import json_response, new_identity
from dovetail.core.server.auth import TENANT
from dovetail.core.server.chats import ChatAnswer, ChatStream
from dovetail.core.server.completions import CompletionAnswer, CompletionStream
from dovetail.core.server.context import Context
from dovetail.core.server.deadline import timeout_of
from dovetail.core.server.forms import Form, requested_form, with_form
from dovetail.core.server.jobs import Deltas, Job, run_jobs
from dovetail.core.server.metrics import ARRIVAL
from dovetail.core.server.parse import read_json
from dovetail.core.server.prompts import chat_prompt, text_prompts
from dovetail.core.server.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    GenerationRequest,
)
from dovetail.core.server.requestid import request_id
from dovetail.core.server.sampling import fit_to_context, for_chat, for_completion
from dovetail.core.server.sse import EventStream, Renderer
from dovetail.core.server.tools import forced_call
from dovetail.core.server.unsupported import refuse_unsupported

__all__ = ["create_chat_completion", "create_completion"]

DEFAULT_MAX_TOKENS = 16
"""For completions, as OpenAI has it; a chat may fill the context."""


async def create_completion(context: Context, http: Request) -> Response:
    """Complete one prompt or several."""
    context.admission.check(context.client)
    request = await read_json(http, CompletionRequest, context.limits, context.unknown_fields)
    identity = new_identity(context, "cmpl", context.model_name(request.model))
    refuse_unsupported(request)
    form = requested_form(request, context.limits.json_depth)
    params = with_form(for_completion(request, context.client.info), form)
    prompts = await text_prompts(
        context,
        request.prompt,
        add_special_tokens=request.add_special_tokens is not False,
        truncate=request.truncate_prompt_tokens,
    )
    jobs = _jobs(context, http, request, prompts, params, identity.id, DEFAULT_MAX_TOKENS, form)
    answer = CompletionAnswer(context.client.tokenizer, request, identity, jobs)
    if request.stream:
        return _streamed(context, http, jobs, CompletionStream(answer))
    return await _whole(context, http, jobs, answer.whole)


async def create_chat_completion(context: Context, http: Request) -> Response:
    """Answer a conversation."""
    context.admission.check(context.client)
    request = await read_json(http, ChatCompletionRequest, context.limits, context.unknown_fields)
    identity = new_identity(context, "chatcmpl", context.model_name(request.model))
    refuse_unsupported(request)
    depth = context.limits.json_depth
    call = forced_call(request, depth)
    form = requested_form(request, depth, call.form if call else None)
    params = with_form(for_chat(request, context.client.info), form)
    prompt = await chat_prompt(
        context,
        request.messages,
        request,
        add_special_tokens=bool(request.add_special_tokens),
        truncate=request.truncate_prompt_tokens,
    )
    jobs = _jobs(context, http, request, [prompt], params, identity.id, None, form)
    role = context.settings.response_role
    answer = ChatAnswer(context.client.tokenizer, request, identity, jobs, role, call)
    if request.stream:
        return _streamed(context, http, jobs, ChatStream(answer))
    return await _whole(context, http, jobs, answer.whole)


def _jobs(
    context: Context,
    http: Request,
    request: GenerationRequest,
    prompts: list[PromptTokens],
    params: SamplingParams,
    answer_id: str,
    default_max_tokens: int | None,
    form: Form | None,
) -> list[Job]:
    """One job per prompt, after the request's cost as a whole was found bearable."""
    _check_cost(context, prompts, params)
    param = "messages" if isinstance(request, ChatCompletionRequest) else "prompt"
    info, salt = context.client.info, _cache_salt(http, request)
    timeout = timeout_of(http, request, context.settings)
    return [
        Job(
            prompt=prompt,
            params=fit_to_context(
                params, len(prompt.token_ids), info, default=default_max_tokens, param=param
            ),
            request_id=f"{answer_id}-{i}",
            arrival=http.scope[ARRIVAL],
            priority=request.priority or 0,
            cache_salt=salt,
            timeout=timeout,
            form_field=form.field if form else "",
        )
        for i, prompt in enumerate(prompts)
    ]


def _check_cost(context: Context, prompts: list[PromptTokens], params: SamplingParams) -> None:
    limits = context.limits
    name, count = ("n", params.n) if params.best_of is None else ("best_of", params.best_of)
    if params.use_beam_search and count > limits.num_beams:
        message = f"A beam search may have at most {limits.num_beams} beams here, not {count}."
        raise RequestError(message, param=name)
    num_choices = len(prompts) * count
    if num_choices > limits.num_choices:
        message = f"{name} times the number of prompts must not be above {limits.num_choices}."
        raise RequestError(message, param=name)
    form = params.structured_outputs
    if form and form.num_chars * num_choices > limits.num_form_chars:
        message = (
            f"A form of {form.num_chars} characters is too long for so many choices: characters"
            f" times {name} times the number of prompts must not be above {limits.num_form_chars}."
        )
        raise RequestError(message, param=name)
    if params.prompt_logprobs is not None:
        rows = sum(len(prompt.token_ids) for prompt in prompts)
        if rows * (params.prompt_logprobs + 1) > limits.num_prompt_logprobs:
            message = (
                f"Log-probabilities for {rows} prompt tokens are too many for one request:"
                f" tokens times alternatives must not be above {limits.num_prompt_logprobs}."
            )
            raise RequestError(message, param="prompt_logprobs")


def _cache_salt(http: Request, request: GenerationRequest) -> str:
    """The client's salt inside its own tenant: no key can probe what another has cached."""
    tenant = http.scope.get(TENANT, "")
    return f"{tenant}:{request.cache_salt or ''}" if tenant else request.cache_salt or ""


def _streamed(context: Context, http: Request, jobs: list[Job], renderer: Renderer) -> Response:
    return EventStream(
        run_jobs(context.client, jobs, context.metrics),
        renderer,
        admission=context.admission,
        keep_alive_s=context.settings.keep_alive_s,
        request_id=request_id(http.scope),
    )


async def _whole(
    context: Context,
    http: Request,
    jobs: list[Job],
    build: Callable[[Deltas], Awaitable[msgspec.Struct]],
) -> Response:
    """Everything at the end, unless the client goes before."""

    async def work() -> msgspec.Struct:
        return await build(run_jobs(context.client, jobs, context.metrics))

    return json_response(await attended(work(), http.receive, context.admission))
