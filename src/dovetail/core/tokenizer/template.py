"""One chat template: a jinja2 program in a sandbox.

The environment is the one that templates are written for, that of the transformers library:
https://huggingface.co/docs/transformers/chat_templating_writing
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from dovetail.core.errors import RequestError
from dovetail.core.tokenizer.conversation import ContentForm

__all__ = ["ChatTemplate", "TemplateRefusedError", "compile_template"]

_PROBE = "dovetail-probe"


class TemplateRefusedError(RequestError):
    """The template itself rejected the conversation, with ``raise_exception``."""


class _Refused(jinja2.TemplateError):
    """Carries the template's own message through jinja2."""


class ChatTemplate:
    """A compiled template. Safe to share between threads.

    Raises:
        RequestError: The template is not valid jinja2; names the line.
    """

    def __init__(self, source: str) -> None:
        try:
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(
                f"The chat template has an error in line {error.lineno}: {error.message}",
                param="chat_template",
            ) from error
        self._content_form: ContentForm | None = None

    def render(self, variables: Mapping[str, Any]) -> str:
        """Fill the template in.

        Raises:
            TemplateRefusedError: With the template's own message.
            RequestError: The template failed on these variables.
        """
        try:
            return self._template.render(variables)
        except _Refused as error:
            raise TemplateRefusedError(
                f"The model's chat template rejects this conversation: {error.message}",
                param="messages",
            ) from error
        except Exception as error:
            raise RequestError(
                "The model's chat template failed on this conversation:"
                f" {type(error).__name__}: {error}",
                param="messages",
            ) from error

    def content_form(self, variables: Mapping[str, Any]) -> ContentForm:
        """What the template can read as content, found by trying both forms once.

        Args:
            variables: The special tokens.
        """
        if self._content_form is None:
            self._content_form = self._find_content_form(variables)
        return self._content_form

    def _find_content_form(self, variables: Mapping[str, Any]) -> ContentForm:
        part = {"type": "text", "text": _PROBE}
        takes_string = _PROBE in self._probe(_PROBE, variables)
        shown = self._probe([part], variables)
        as_data = str(part) in shown or json.dumps(part) in shown
        takes_parts = _PROBE in shown and not as_data
        if takes_parts:
            return "any" if takes_string else "parts"
        return "string"

    def _probe(self, content: Any, variables: Mapping[str, Any]) -> str:
        messages = [{"role": "user", "content": content}]
        try:
            return self.render({**variables, "messages": messages})
        except RequestError:
            return ""


@lru_cache(maxsize=64)
def compile_template(source: str) -> ChatTemplate:
    """The compiled form of ``source``; the last 64 are kept."""
    return ChatTemplate(source)


class _GenerationTag(Extension):
    """``{% generation %}`` marks what the model said, for training. Here it only groups."""

    tags = {"generation"}  # noqa: RUF012  (the base class declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class _Dict:
    """``dict(...)`` for templates, without the attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Any, value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


class _Namespace(Namespace):
    """``namespace(...)`` for templates, which may not store names that Python gives a meaning."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _reject_private(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _reject_private(name)
        super().__setitem__(name, value)


def _reject_private(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace may not hold {name!r}: names must not start with '_'")


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As jinja2's filter, but without HTML escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise _Refused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment


_ENVIRONMENT = _environment()
