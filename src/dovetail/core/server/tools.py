"""Forced tool calls: the grammar of a call, and the call that a text of that grammar makes."""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from dovetail.core.constraint import StructuredOutputsParams
from dovetail.core.errors import RequestError
from dovetail.core.server.forms import Form, in_clients_words
from dovetail.core.server.parse import check_depth
from dovetail.core.server.protocol import ChatCompletionRequest

__all__ = ["CallText", "ForcedCall", "forced_call"]

_NAME = re.compile(r"[a-zA-Z0-9_.:-]{1,128}")
_NO_PARAMETERS = {"type": "object", "properties": {}, "additionalProperties": False}
_CLOSE = "}"


@dataclass(frozen=True, kw_only=True)
class ForcedCall:
    """One call that the answer must be, to one of several tools."""

    heads: tuple[tuple[str, str], ...]
    """Each tool's name and what the text begins with that calls it; empty if there is one tool, and
    the text is its arguments."""
    form: Form
    named: bool
    """The client named the tool. Such an answer ends with ``stop``, as OpenAI's do."""

    def reason(self, reason: str | None) -> str | None:
        """The finish reason to tell."""
        return "tool_calls" if reason == "stop" and not self.named else reason


def forced_call(request: ChatCompletionRequest, depth: int) -> ForcedCall | None:
    """What ``tool_choice`` forces; None if the model is free.

    Args:
        request: Already decoded.
        depth: How deeply a tool may be nested.

    Raises:
        RequestError: The choice, or a tool that it names, cannot be used.
    """
    choice = request.tool_choice
    if choice in (None, "auto", "none"):
        return None
    for i, tool in enumerate(request.tools or ()):
        check_depth(tool, depth, f"tools.{i}")
    tools = [_function(tool, i) for i, tool in enumerate(request.tools or ())]
    named = choice != "required"
    if named:
        name = _chosen(choice)
        tools = [tool for tool in tools if tool[0] == name]
    if not tools:
        missing = f"no tool of the name {name!r:.80}" if named else "no tools"
        raise RequestError(f"tool_choice: there is {missing}.", param="tool_choice")
    try:
        heads, params = _heads_and_form(tools)
    except RequestError as error:
        raise in_clients_words(error, "tools") from None
    return ForcedCall(heads=heads, form=Form(params, "tools"), named=named)


def _heads_and_form(
    tools: list[tuple[str, dict[str, Any]]],
) -> tuple[tuple[tuple[str, str], ...], StructuredOutputsParams]:
    if len(tools) == 1:
        ((name, schema),) = tools
        return ((name, ""),), StructuredOutputsParams(json=schema)
    heads = tuple((name, f'{{"name": "{name}", "arguments": ') for name, _ in tools)
    return heads, StructuredOutputsParams(grammar=_grammar(heads, tools))


def _chosen(choice: Any) -> str:
    function = choice.get("function") if isinstance(choice, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str) or choice.get("type") != "function":
        raise RequestError(
            'tool_choice must be "none", "auto", "required" or'
            ' {"type": "function", "function": {"name": ...}}.',
            param="tool_choice",
        )
    return name


def _function(tool: dict[str, Any], index: int) -> tuple[str, dict[str, Any]]:
    """Name and schema of the parameters."""
    where = f"tools.{index}.function"
    function = tool.get("function")
    if tool.get("type") != "function" or not isinstance(function, dict):
        message = f'tools.{index} must be {{"type": "function", "function": ...}}.'
        raise RequestError(message, param=f"tools.{index}")
    name, schema = function.get("name"), function.get("parameters")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        message = f"{where}.name must be letters, digits and _ . : -, at most 128 of them."
        raise RequestError(message, param=f"{where}.name")
    if schema is not None and not isinstance(schema, dict):
        param = f"{where}.parameters"
        raise RequestError(f"{param} must be a JSON schema.", param=param)
    return name, schema or _NO_PARAMETERS


def _grammar(heads: Sequence[tuple[str, str]], tools: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """In Lark notation with llguidance's ``%json``: the head of a call, and its arguments."""
    lines = ["start: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
    for i, ((_, head), (_, schema)) in enumerate(zip(heads, tools, strict=True)):
        options = {"x-guidance": {"whitespace_pattern": r"\x20"}}
        arguments = json.dumps({**options, **schema})
        lines.append(f"call_{i}: {json.dumps(head)} %json {arguments} {json.dumps(_CLOSE)}")
    return "\n".join(lines)


class CallText:
    """Takes the text of one forced call as it comes, and tells name and arguments apart."""

    def __init__(self, call: ForcedCall) -> None:
        self.id = f"call_{uuid.uuid4().hex[:24]}"
        self.name: str | None = None
        """Known once enough of the text has come."""
        self._heads = call.heads
        self._has_close = bool(call.heads[0][1])
        self._held = ""
        self._arguments: list[str] = []

    def feed(self, text: str, *, last: bool) -> str:
        """The next piece of the text; returns the next piece of the arguments.

        Args:
            text: What follows the piece before.
            last: Nothing comes after it.
        """
        self._held += text
        if self.name is None and not self._find_name():
            return ""
        piece = self._held
        if self._has_close and not (last and self._is_cut_off()):
            piece = self._held[: -len(_CLOSE)]
        self._held = self._held[len(piece) :]
        self._arguments.append(piece)
        return piece

    def _find_name(self) -> bool:
        for name, head in self._heads:
            if self._held.startswith(head):
                self.name = name
                self._held = self._held[len(head) :]
                return True
        return False

    def _is_cut_off(self) -> bool:
        """Whether the last character held is still part of the arguments: they are not whole."""
        so_far = "".join(self._arguments) + self._held[: -len(_CLOSE)]
        try:
            msgspec.json.decode(so_far)
        except msgspec.DecodeError:
            return True
        return not self._held.endswith(_CLOSE)
