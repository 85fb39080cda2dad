"""A model's chat templates, and which of them a request gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.core.errors import RequestError
from dovetail.core.tokenizer.base import Message
from dovetail.core.tokenizer.conversation import normalise, plain
from dovetail.core.tokenizer.template import ChatTemplate, TemplateRefusedError, compile_template

__all__ = ["ChatTemplates"]

_NO_TEMPLATE = (
    "This model has no chat template: it is probably a base model, not trained for conversation."
    " Send the text to /v1/completions instead, or start the server with --chat-template FILE to"
    " say how a conversation is to be written."
)
_END_MARK = "<<END-OF-OPEN-MESSAGE>> "
"""Put after a message that is to be continued; what follows it is cut off. If the space is gone
afterwards, the template strips messages."""


class ChatTemplates:
    """A model's chat templates, ready to be filled in. Safe to share between threads.

    Args:
        templates: Template text by name; ``default`` is the usual one.
        special_tokens: What templates know as ``bos_token``, ``eos_token``, ...
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self._templates = dict(templates)
        self._special_tokens = dict(special_tokens)

    @property
    def default(self) -> str | None:
        """The usual template; None for a base model."""
        return self._templates.get("default")

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """See ``Tokenizer.apply_chat_template``."""
        if not messages:
            raise RequestError("There must be at least one message.", param="messages")
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message goes on in the last message and add_generation_prompt"
                " opens a new one: set one of them to false.",
                param="continue_final_message",
            )
        template = compile_template(self._choose(chat_template, tools is not None))
        variables = {
            **self._special_tokens,
            **plain(template_kwargs or {}),
            "tools": plain(tools),
            "documents": plain(documents),
            "add_generation_prompt": add_generation_prompt,
        }
        return self._fill(template, messages, variables, is_open=continue_final_message)

    def _choose(self, wanted: str | None, has_tools: bool) -> str:
        """The text of the template to use."""
        if wanted is not None:
            return self._templates.get(wanted, wanted)
        if has_tools and "tool_use" in self._templates:
            return self._templates["tool_use"]
        if self.default is not None:
            return self.default
        if self._templates:
            names = ", ".join(sorted(self._templates))
            raise RequestError(
                f"This model has several chat templates and no default: name one of {names}.",
                param="chat_template",
            )
        raise RequestError(_NO_TEMPLATE, param="messages", code="no_chat_template")

    def _fill(
        self,
        template: ChatTemplate,
        messages: Sequence[Message],
        variables: dict[str, Any],
        *,
        is_open: bool,
    ) -> str:
        """Render; a template that wants the arguments of tool calls as text gets them so."""
        fill = _render_open if is_open else _render
        form = template.content_form(self._special_tokens)
        parsed = normalise(messages, form)
        try:
            return fill(template, parsed, variables)
        except TemplateRefusedError:
            raise
        except RequestError:
            unparsed = normalise(messages, form, parse_arguments=False)
            if parsed == unparsed:
                raise
            return fill(template, unparsed, variables)


def _render(
    template: ChatTemplate, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> str:
    return template.render({**variables, "messages": messages})


def _render_open(
    template: ChatTemplate, messages: list[dict[str, Any]], variables: dict[str, Any]
) -> str:
    """Render up to the end of the last message's text."""
    *earlier, last = messages
    text, marked = _with_mark(last)
    rendered = _render(template, [*earlier, marked], variables)
    end = rendered.rfind(_END_MARK.rstrip())
    if end < 0 or text.strip() not in rendered:
        raise RequestError(
            "continue_final_message: the chat template leaves out part of the last message, so"
            " there is nothing to go on from.",
            param="continue_final_message",
        )
    is_stripped = not rendered.startswith(_END_MARK, end)
    return rendered[:end].rstrip() if is_stripped else rendered[:end]


def _with_mark(message: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The text of ``message`` and a copy whose text ends with the mark."""
    content = message.get("content")
    if isinstance(content, str):
        return content, {**message, "content": content + _END_MARK}
    for part in reversed(content or ()):
        if isinstance(part, dict) and isinstance(part.get("text"), str):
            text = part["text"]
            marked = [{**p, "text": text + _END_MARK} if p is part else p for p in content or ()]
            return text, {**message, "content": marked}
    raise RequestError(
        "continue_final_message: the last message has no text to go on from.",
        param="continue_final_message",
    )
