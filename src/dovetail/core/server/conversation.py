"""Conversations: checks what OpenAI's messages may hold, and lays them out as a prompt."""

from __future__ import annotations

from typing import Any

import msgspec

from dovetail.core.errors import RequestError
from dovetail.core.server.parse import check_depth
from dovetail.core.server.protocol import ChatMessage, ContentPart, TemplateFields, ToolCall
from dovetail.core.server.settings import ServerSettings
from dovetail.core.tokenizer import Tokenizer

__all__ = ["lay_out"]

_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "messages",
        "tokenize",
        "tokenizer",
        "tools",
    }
)
"""Template variables with fields of their own; ``chat_template_kwargs`` must not replace them."""


def lay_out(
    tokenizer: Tokenizer,
    settings: ServerSettings,
    messages: list[ChatMessage],
    fields: TemplateFields,
) -> str | list[int]:
    """Render ``messages`` with the chat template.

    Raises:
        RequestError: A message or a template field cannot be used; names it.
    """
    if not messages:
        raise RequestError("messages must not be empty.", param="messages")
    template = _template(tokenizer, settings, fields)
    continue_final = bool(fields.continue_final_message)
    if continue_final and fields.add_generation_prompt:
        raise RequestError(
            "continue_final_message and add_generation_prompt exclude each other.",
            param="continue_final_message",
        )
    known = template or tokenizer.chat_template or ""
    return tokenizer.apply_chat_template(
        [_turn(message, i, settings, known) for i, message in enumerate(messages)],
        add_generation_prompt=not continue_final and fields.add_generation_prompt is not False,
        continue_final_message=continue_final,
        tools=_tools(fields.tools, settings.limits.json_depth),
        documents=_documents(fields, settings.limits.json_depth),
        chat_template=template,
        template_kwargs=_template_kwargs(fields, settings.limits.json_depth),
    )


def _template(tokenizer: Tokenizer, settings: ServerSettings, fields: TemplateFields) -> str | None:
    if fields.chat_template is None:
        return settings.chat_template
    if not settings.trust_request_chat_template:
        raise RequestError(
            "chat_template: this server does not run templates from requests.",
            param="chat_template",
            code="unsupported",
        )
    return fields.chat_template


def _turn(
    message: ChatMessage, index: int, settings: ServerSettings, template: str
) -> dict[str, Any]:
    """A message for the template, which the tokenizer brings into the form that it expects."""
    where = f"messages.{index}"
    turn: dict[str, Any] = {"role": message.role, "content": _content(message, where)}
    if message.role == "developer" and "developer" not in template:
        turn["role"] = "system"
    if message.tool_calls:
        turn["tool_calls"] = [
            _tool_call(call, f"{where}.tool_calls.{i}", settings.limits.json_depth)
            for i, call in enumerate(message.tool_calls)
        ]
    for name in ("name", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            turn[name] = value
    reasoning = message.reasoning or message.reasoning_content
    if reasoning is not None:
        turn["reasoning_content"] = reasoning
    return turn


def _content(message: ChatMessage, where: str) -> str | list[dict[str, str]]:
    content = message.content
    if isinstance(content, str):
        return content
    if content is None:
        if message.role != "assistant":
            raise RequestError(f"{where}.content is required.", param=f"{where}.content")
        return message.refusal or ""
    return [_part(part, f"{where}.content.{i}") for i, part in enumerate(content)]


def _part(part: ContentPart, where: str) -> dict[str, str]:
    if part.type in ("text", "refusal"):
        text = part.text if part.type == "text" else part.refusal
        if text is None:
            raise RequestError(f"{where}.{part.type} is required.", param=f"{where}.{part.type}")
        return {"type": "text", "text": text}
    raise RequestError(
        f"{where}: this model reads text only, not {part.type!r:.40}.",
        param=where,
        code="unsupported",
    )


def _tool_call(call: ToolCall, where: str, depth: int) -> dict[str, Any]:
    given = call.function.arguments
    arguments: Any = given
    if isinstance(given, str):
        try:
            arguments = msgspec.json.decode(given or "{}")
        except (msgspec.DecodeError, RecursionError):
            param = f"{where}.function.arguments"
            raise RequestError(f"{param} must be JSON.", param=param) from None
    check_depth(arguments, depth, f"{where}.function.arguments")
    function = {"name": call.function.name, "arguments": given if given is not None else "{}"}
    return {"id": call.id, "type": "function", "function": function}


def _tools(tools: list[dict[str, Any]] | None, depth: int) -> list[dict[str, Any]] | None:
    for i, tool in enumerate(tools or ()):
        check_depth(tool, depth, f"tools.{i}")
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict):
            message = f'tools.{i} must be {{"type": "function", "function": ...}}.'
            raise RequestError(message, param=f"tools.{i}")
        if not isinstance(function.get("name"), str):
            param = f"tools.{i}.function.name"
            raise RequestError(f"{param} is required.", param=param)
    return tools or None


def _documents(fields: TemplateFields, depth: int) -> list[dict[str, Any]] | None:
    check_depth(fields.documents, depth, "documents")
    return fields.documents or None


def _template_kwargs(fields: TemplateFields, depth: int) -> dict[str, Any]:
    variables = dict(fields.chat_template_kwargs or {})
    check_depth(variables, depth, "chat_template_kwargs")
    for name in sorted(_RESERVED & variables.keys()):
        param = f"chat_template_kwargs.{name}"
        raise RequestError(f"{param} has a field of its own in the request.", param=param)
    if fields.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", fields.reasoning_effort)
    return variables
