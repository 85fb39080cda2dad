"""What the text of an answer must look like, as a user asks for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from dovetail.core.errors import RequestError

__all__ = ["MAX_CONSTRAINT_CHARS", "StructuredOutputsParams"]

MAX_CONSTRAINT_CHARS = 1 << 19
"""The longest schema, grammar, expression or list of choices, in characters."""
_KINDS = ("json", "regex", "choice", "grammar", "json_object")


class StructuredOutputsParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The form of an answer: exactly one of the first five. Names and meanings are vLLM's.

    Whether a schema or grammar is a valid one is found out later, where it is compiled.

    Raises:
        RequestError: None or several forms, a value of the wrong type, or one that is too long.
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema, as a mapping or as text; kept as text."""
    regex: str | None = None
    """A regular expression that the whole answer matches; no look-around, no back references."""
    choice: list[str] | None = None
    """The answer is one of these."""
    grammar: str | None = None
    """A context-free grammar in EBNF (GBNF) or Lark notation."""
    json_object: bool | None = None
    """Any JSON object."""
    disable_any_whitespace: bool = False
    """JSON without white space between its parts."""
    whitespace_pattern: str | None = None
    """A regular expression for the white space that JSON may have between its parts."""

    def __post_init__(self) -> None:
        given = [name for name in _KINDS if getattr(self, name) not in (None, False)]
        if len(given) != 1:
            said = "none" if not given else " and ".join(given)
            raise _error(f"needs exactly one of {', '.join(_KINDS)}; it has {said}", None)
        if isinstance(self.json, dict):
            msgspec.structs.force_setattr(self, "json", _as_text(self.json))
        for name in ("json", "regex", "grammar", "whitespace_pattern"):
            self._check_text(name)
        self._check_choice()
        for name in ("json_object", "disable_any_whitespace"):
            if type(getattr(self, name)) not in (bool, type(None)):
                raise _error("must be true or false", name)
        if self.whitespace_pattern is not None and self.disable_any_whitespace:
            raise _error("excludes disable_any_whitespace", "whitespace_pattern")

    @property
    def kind(self) -> str:
        """Which of the forms it is: the field's name."""
        return next(name for name in _KINDS if getattr(self, name) not in (None, False))

    @property
    def num_chars(self) -> int:
        """Its length, as the limit counts it."""
        value = getattr(self, self.kind)
        return sum(map(len, value)) if isinstance(value, list) else len(str(value))

    @classmethod
    def of(cls, fields: Mapping[str, Any]) -> StructuredOutputsParams:
        """From a mapping with the same names, as clients send it.

        Raises:
            RequestError: As above, or a name is unknown.
        """
        unknown = sorted(set(fields) - set(cls.__struct_fields__))
        if unknown:
            known = ", ".join(cls.__struct_fields__)
            raise _error(f"has no field {unknown[0]!r:.80}; it may have {known}", None)
        return cls(**fields)

    def _check_text(self, name: str) -> None:
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, str) or not value:
            kinds = "a JSON object or its text" if name == "json" else "a text that is not empty"
            raise _error(f"must be {kinds}, not {value!r:.80}", name)
        _check_length(len(value), name)

    def _check_choice(self) -> None:
        choice = self.choice
        if choice is None:
            return
        if not isinstance(choice, list) or not all(isinstance(c, str) and c for c in choice):
            raise _error("must be a list of texts, none of them empty", "choice")
        if not choice:
            raise _error("must hold at least one text", "choice")
        _check_length(sum(map(len, choice)), "choice")


def _as_text(schema: dict[str, Any]) -> str:
    try:
        return msgspec.json.encode(schema).decode()
    except (TypeError, ValueError, RecursionError) as error:
        raise _error(f"must hold JSON and nothing else: {error}"[:200], "json") from None


def _check_length(length: int, name: str) -> None:
    if length > MAX_CONSTRAINT_CHARS:
        raise _error(f"has {length} characters; at most {MAX_CONSTRAINT_CHARS} are read", name)


def _error(what: str, name: str | None) -> RequestError:
    param = "structured_outputs" if name is None else f"structured_outputs.{name}"
    return RequestError(f"{param} {what}.", param=param)
