"""From what clients send to token ids: texts, lists of ids, and conversations."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Sequence
from typing import Any, cast

from dovetail.core.errors import RequestError
from dovetail.core.request import PromptTokens
from dovetail.core.server.context import Context
from dovetail.core.server.conversation import lay_out
from dovetail.core.server.protocol import ChatMessage, TemplateFields
from dovetail.core.server.sampling import check_token_ids, context_overflow
from dovetail.core.tokenizer import Tokenizer

__all__ = ["chat_prompt", "decode_tokens", "encode_text", "needs_tokenizer", "text_prompts"]

INLINE_CHARS = 4096
"""Longer texts are tokenised in a thread, so that other streams do not wait for them."""
INLINE_MESSAGES = 32
"""Longer conversations are laid out in a thread."""
SMALL_TOKEN_CHARS = 16
"""Texts up to this many characters per token of context are tokenised without further ado."""


def needs_tokenizer(context: Context, what: str, param: str) -> Tokenizer:
    """The tokenizer, for a request that cannot do without.

    Raises:
        RequestError: The server runs without one.
    """
    if context.client.tokenizer is None:
        message = f"{what} needs a tokenizer, and this server runs without one; send token ids."
        raise RequestError(message, param=param, code="no_tokenizer")
    return context.client.tokenizer


async def text_prompts(
    context: Context,
    prompt: str | list[str | int | list[int]],
    *,
    add_special_tokens: bool,
    truncate: int | None,
) -> list[PromptTokens]:
    """The prompts of a completion request: one text, one list of ids, or a list of either.

    Raises:
        RequestError: No prompt, an empty one, too many, mixed kinds, or ids out of range.
    """
    is_one = isinstance(prompt, str) or (prompt and isinstance(prompt[0], int))
    items: list[Any] = [prompt] if is_one else list(prompt)
    most = context.limits.num_prompts
    if not 0 < len(items) <= most:
        message = f"prompt must hold 1 to {most} prompts, not {len(items)}."
        raise RequestError(message, param="prompt")
    kind = type(items[0])
    result = []
    for i, item in enumerate(items):
        name = "prompt" if is_one else f"prompt.{i}"
        if type(item) is not kind or isinstance(item, int):
            raise RequestError("prompt must hold texts, or token ids, not both.", param=name)
        if isinstance(item, str):
            ids = await encode_text(context, item, add_special_tokens, name)
            result.append(PromptTokens(text=item, token_ids=_truncated(context, ids, truncate)))
        else:
            ids = _checked_ids(context, item, name)
            result.append(PromptTokens(text=None, token_ids=_truncated(context, ids, truncate)))
        if not ids:
            raise RequestError("The prompt is empty; it needs at least one token.", param=name)
    return result


def _checked_ids(context: Context, item: Sequence[Any], name: str) -> list[int]:
    for i, token_id in enumerate(item):
        if not isinstance(token_id, int):
            message = "prompt must hold texts, or token ids, not both."
            raise RequestError(message, param=f"{name}.{i}")
    check_token_ids(item, context.client.info, name)
    return cast(list[int], item)


async def encode_text(
    context: Context, text: str, add_special_tokens: bool, param: str, *, bounded: bool = True
) -> list[int]:
    """Tokenise, without holding up the event loop, and without trying what cannot fit.

    Args:
        context: The server.
        text: What to tokenise.
        add_special_tokens: As ``Tokenizer.encode`` has it.
        param: The field that holds the text, for errors.
        bounded: Refuse a text that is longer than the context even in the longest tokens.

    Raises:
        ContextLengthError: The text is too long for any tokenisation of it to fit.
    """
    tokenizer, info = needs_tokenizer(context, "A text", param), context.client.info
    if bounded and len(text) > info.max_model_len * SMALL_TOKEN_CHARS:
        longest = await asyncio.to_thread(lambda: context.longest_token)
        if len(text) > info.max_model_len * longest:
            raise context_overflow(info, -(-len(text) // longest), None, param)
    encode = functools.partial(tokenizer.encode, text, add_special_tokens=add_special_tokens)
    return encode() if len(text) <= INLINE_CHARS else await asyncio.to_thread(encode)


async def decode_tokens(context: Context, ids: list[int]) -> str:
    """The text of ``ids``, without holding up the event loop."""
    tokenizer = needs_tokenizer(context, "Text", "tokens")
    decode = functools.partial(tokenizer.decode, ids, skip_special_tokens=False)
    return decode() if len(ids) <= INLINE_CHARS else await asyncio.to_thread(decode)


def _truncated(context: Context, ids: list[int], keep: int | None) -> list[int]:
    """The last ``keep`` ids; all of them for None, as many as the model can take for -1.

    Raises:
        RequestError: ``keep`` is neither.
    """
    if keep is None:
        return ids
    most = context.client.info.max_model_len
    if keep != -1 and not 1 <= keep <= most:
        message = f"truncate_prompt_tokens must be -1 or an integer from 1 to {most}."
        raise RequestError(message, param="truncate_prompt_tokens")
    return ids[-(most - 1 if keep == -1 else keep) :]


async def chat_prompt(
    context: Context,
    messages: list[ChatMessage],
    fields: TemplateFields,
    *,
    add_special_tokens: bool,
    truncate: int | None = None,
) -> PromptTokens:
    """Lay out a conversation with the chat template and tokenise it.

    Raises:
        RequestError: The conversation is malformed, or the template refused it.
    """
    tokenizer = needs_tokenizer(context, "A conversation", "messages")
    if len(messages) > context.client.info.max_model_len:
        raise context_overflow(context.client.info, len(messages), None, "messages")
    render = functools.partial(lay_out, tokenizer, context.settings, messages, fields)
    rendered = render() if _is_small(messages, fields) else await asyncio.to_thread(render)
    if isinstance(rendered, str):
        ids = await encode_text(context, rendered, add_special_tokens, "messages")
        prompt = PromptTokens(text=rendered, token_ids=_truncated(context, ids, truncate))
    else:
        prompt = PromptTokens(text=None, token_ids=_truncated(context, rendered, truncate))
    if not prompt.token_ids:
        raise RequestError("The conversation gives an empty prompt.", param="messages")
    return prompt


def _is_small(messages: list[ChatMessage], fields: TemplateFields) -> bool:
    """Whether the layout takes so little that a thread would cost more."""
    if len(messages) > INLINE_MESSAGES or fields.tools or fields.documents:
        return False
    return sum(len(message.content or "") for message in messages) <= INLINE_CHARS
