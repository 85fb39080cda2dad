"""What is served: models, and the tokenizer for clients that count tokens themselves."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from dovetail.core.errors import RequestError
from dovetail.core.server.answers import json_response
from dovetail.core.server.context import Context
from dovetail.core.server.parse import read_json
from dovetail.core.server.prompts import chat_prompt, decode_tokens, encode_text, needs_tokenizer
from dovetail.core.server.protocol import DetokenizeRequest, TokenizeRequest
from dovetail.core.server.replies import (
    Detokenized,
    ModelCard,
    ModelList,
    Tokenized,
    TokenizerInfo,
)
from dovetail.core.server.sampling import check_token_ids

__all__ = ["detokenize", "list_models", "retrieve_model", "tokenize", "tokenizer_info"]


async def list_models(context: Context, http: Request) -> Response:
    """Every name under which the model is served."""
    return json_response(ModelList(data=[_card(context, name) for name in context.names]))


async def retrieve_model(context: Context, http: Request) -> Response:
    """One served name; names may contain slashes."""
    return json_response(_card(context, context.model_name(http.path_params["model"])))


def _card(context: Context, name: str) -> ModelCard:
    info = context.client.info
    return ModelCard(
        id=name, created=context.created, root=info.name, max_model_len=info.max_model_len
    )


async def tokenize(context: Context, http: Request) -> Response:
    """Token ids of a text, or of a conversation as the chat template lays it out."""
    request = await read_json(http, TokenizeRequest, context.limits, context.unknown_fields)
    context.model_name(request.model)
    if (request.prompt is None) == (request.messages is None):
        raise RequestError("Give either prompt or messages.", param="prompt")
    if request.messages is not None:
        special = bool(request.add_special_tokens)
        laid_out = await chat_prompt(context, request.messages, request, add_special_tokens=special)
        ids = laid_out.token_ids
    else:
        ids = await _tokenize_text(context, request.prompt or "", request.add_special_tokens)
    result = Tokenized(count=len(ids), max_model_len=context.client.info.max_model_len, tokens=ids)
    if request.return_token_strs:
        tokenizer = needs_tokenizer(context, "return_token_strs", "return_token_strs")
        result.token_strs = [tokenizer.token_text(token_id) for token_id in ids]
    return json_response(result)


async def _tokenize_text(context: Context, text: str, special: bool | None) -> list[int]:
    most = context.limits.tokenize_chars
    if len(text) > most:
        message = f"prompt must not be longer than {most} characters."
        raise RequestError(message, param="prompt")
    return await encode_text(context, text, special is not False, "prompt", bounded=False)


async def detokenize(context: Context, http: Request) -> Response:
    """The text of token ids."""
    request = await read_json(http, DetokenizeRequest, context.limits, context.unknown_fields)
    context.model_name(request.model)
    check_token_ids(request.tokens, context.client.info, "tokens")
    return json_response(Detokenized(prompt=await decode_tokens(context, request.tokens)))


async def tokenizer_info(context: Context, http: Request) -> Response:
    """The tokenizer's special tokens and chat template."""
    tokenizer = needs_tokenizer(context, "This route", "tokenizer")
    return json_response(
        TokenizerInfo(
            bos_token=tokenizer.bos_token,
            eos_token=tokenizer.eos_token,
            pad_token=tokenizer.pad_token,
            chat_template=context.settings.chat_template or tokenizer.chat_template,
        )
    )
