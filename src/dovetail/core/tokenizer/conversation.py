"""Conversations as clients send them, brought into the form that a chat template expects."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from dovetail.core.errors import RequestError
from dovetail.core.tokenizer.base import Message

__all__ = ["ContentForm", "normalise", "plain"]

ContentForm: TypeAlias = Literal["string", "parts", "any"]
"""What a template can read as ``content``: a string, a list of typed parts, or both."""

_REASONING = ("reasoning_content", "thinking", "reasoning")
_TEXT_KEYS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of parts that are text, and where the text is."""


def normalise(
    messages: Sequence[Message], form: ContentForm, *, parse_arguments: bool = True
) -> list[dict[str, Any]]:
    """A copy of ``messages`` out of plain data, as templates expect it.

    Keys without a value are left out, reasoning is found under each of its names, and the
    arguments of tool calls, which the OpenAI API has as text, are objects.

    Args:
        messages: As a client sent them.
        form: What the template can read as content.
        parse_arguments: Turn the arguments of tool calls into objects.

    Raises:
        RequestError: A message is no object, or its content is not text and cannot be.
    """
    try:
        copies = [plain(message) for message in messages]
    except RecursionError as error:
        raise RequestError("The messages are nested too deeply.", param="messages") from error
    return [_message(copy, i, form, parse_arguments) for i, copy in enumerate(copies)]


def plain(value: Any) -> Any:
    """``value`` out of JSON types alone, so that a template reaches no methods of other objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    for kind in (str, int, float):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    dump = getattr(value, "model_dump", None)
    return plain(dump()) if callable(dump) else f"<{type(value).__name__}>"


def _message(given: Any, index: int, form: ContentForm, parse_arguments: bool) -> dict[str, Any]:
    if not isinstance(given, dict):
        raise RequestError(
            f"A message must be an object with role and content, not {given!r:.80}.",
            param=f"messages.{index}",
        )
    message: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    reasoning = next((message[key] for key in _REASONING if key in message), None)
    if reasoning is not None:
        message = {"thinking": reasoning, **message, "reasoning_content": reasoning}
    content = message.get("content")
    if form == "string" and isinstance(content, list):
        message["content"] = _as_text(content, f"messages.{index}.content")
    elif form == "parts" and isinstance(content, str):
        message["content"] = [{"type": "text", "text": content}]
    if parse_arguments:
        for call in message.get("tool_calls", ()):
            _parse_arguments(call)
    return message


def _as_text(parts: list[Any], path: str) -> str:
    texts = []
    for i, part in enumerate(parts):
        kind = part.get("type", "text") if isinstance(part, dict) else None
        text = part if isinstance(part, str) else part.get(_TEXT_KEYS.get(kind)) if kind else None
        if not isinstance(text, str):
            raise RequestError(
                f"This model's chat template takes text only, not a part of type {kind!r}.",
                param=f"{path}.{i}",
            )
        texts.append(text)
    return "\n".join(texts)


def _parse_arguments(call: Any) -> None:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except ValueError:
        return
    if isinstance(arguments, dict):
        function["arguments"] = arguments
