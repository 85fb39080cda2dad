"""From a user's constraint to llguidance's form of a grammar.

May take long or fail in any way on a hostile constraint: runs in the examining process only.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from llguidance import LLMatcher
from llguidance.gbnf_to_lark import any_to_lark

from dovetail.core.constraint import StructuredOutputsParams

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

__all__ = ["grammar_source"]

WHITESPACE = r"\x20|\r?\n[\x20\x09]{0,32}"
"""Between the parts of JSON: a space, or a new line with indentation. More of it has no use, and
models are known to get stuck in it."""


def grammar_source(form: StructuredOutputsParams) -> str:
    """The grammar as llguidance's JSON.

    Raises:
        ValueError: It cannot be read; says why.
    """
    if form.regex is not None:
        return LLMatcher.grammar_from_regex(form.regex)
    if form.choice is not None:
        texts = (json.dumps(text, ensure_ascii=False) for text in dict.fromkeys(form.choice))
        return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + " | ".join(texts))
    if form.grammar is not None:
        return LLMatcher.grammar_from_lark(_as_lark(form.grammar))
    schema = str(form.json) if form.json is not None else '{"type": "object"}'
    return LLMatcher.grammar_from_json_schema(_as_object(schema), defaults=_options(form))


def _as_lark(grammar: str) -> str:
    try:
        return any_to_lark(grammar)
    except Exception as error:  # what it raises is no more special than this
        raise ValueError(str(error)) from error


def _as_object(schema: str) -> str:
    """The schemas ``true`` and ``false`` are written as objects too."""
    return {"true": "{}", "false": '{"not": {}}'}.get(schema.strip(), schema)


def _options(form: StructuredOutputsParams) -> JsonCompileOptions:
    if form.disable_any_whitespace:
        return {"whitespace_flexible": False}
    return {"whitespace_pattern": form.whitespace_pattern or WHITESPACE}
