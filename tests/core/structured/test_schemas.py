"""Random tokens under a grammar give what the grammar says, whatever the schema."""

from __future__ import annotations

import json
import re

import jsonschema
import pytest

from tests.core.structured.cases import check_json, grammar, random_answer, written
from tests.core.structured.schemas import HAND_WRITTEN, generated

SCHEMAS = [*HAND_WRITTEN, *generated(100)]


def test_there_are_enough_schemas() -> None:
    assert len(SCHEMAS) >= 200
    assert len({json.dumps(schema) for schema in SCHEMAS}) == len(SCHEMAS)


@pytest.mark.parametrize("seed", range(4))
def test_random_tokens_give_valid_json_for_every_schema(seed: int) -> None:
    for schema in SCHEMAS:
        text = written(random_answer(grammar(json=schema), seed))
        try:
            check_json(schema, text)
        except (ValueError, jsonschema.ValidationError) as error:
            pytest.fail(f"{json.dumps(schema)}\n{text!r}\n{error}")


def test_the_judge_can_say_no() -> None:
    for schema, text in [
        ({"type": "integer", "maximum": 3}, "4"),
        ({"type": "string", "format": "time"}, '"12:00"'),
        ({"type": "string", "format": "uuid"}, '"x"'),
        ({"type": "object", "required": ["a"]}, "{}"),
    ]:
        with pytest.raises(jsonschema.ValidationError):
            check_json(schema, text)


REGEXES = [
    r"[a-f0-9]{8}",
    r"(yes|no|maybe)",
    r"\d{3}-\d{4}",
    r"[A-Z][a-z]{2,9}( [A-Z][a-z]{2,9})?",
    r"a{3,5}b{0,2}c",
    r"(\+|-)?[1-9][0-9]{0,3}(\.[0-9]{1,2})?",
    r"[äöüß]{2,4}",
    r"^(cat|dog)$",
    r"[^a-zA-Z]{1,6}",
]


@pytest.mark.parametrize("regex", REGEXES)
def test_random_tokens_match_the_expression(regex: str) -> None:
    for seed in range(20):
        text = written(random_answer(grammar(regex=regex), seed))
        assert re.fullmatch(regex, text), text


@pytest.mark.parametrize(
    "choice",
    [
        ["yes", "no"],
        ["a", "ab", "abc"],
        ['quo"te', "back\\slash", "new\nline"],
        ["é", "😀 x", " s"],
    ],
)
def test_random_tokens_choose_one(choice: list[str]) -> None:
    seen = {written(random_answer(grammar(choice=choice), seed)) for seed in range(60)}
    assert seen == set(choice)


def _depth(text: str) -> int | None:
    inner = text.strip("()")
    count = text.count("(")
    return count if text == "(" * count + "x" + ")" * count and inner == "x" else None


def test_random_tokens_follow_a_grammar_in_ebnf() -> None:
    source = grammar(grammar='root ::= "(" root ")" | "x"')
    depths = {_depth(written(random_answer(source, seed))) for seed in range(30)}
    assert None not in depths and len(depths) > 1


def test_random_tokens_follow_a_grammar_in_lark_notation() -> None:
    source = grammar(grammar='start: SUM ("+" SUM)~0..3\nSUM: /[0-9]{1,3}/')
    for seed in range(20):
        assert re.fullmatch(r"\d{1,3}(\+\d{1,3}){0,3}", written(random_answer(source, seed)))


def test_a_left_recursive_grammar_is_followed() -> None:
    source = grammar(grammar='start: start "a" | "b"')
    assert re.fullmatch("ba*", written(random_answer(source, 1)))


def test_json_object_is_any_object() -> None:
    for seed in range(40):
        try:
            tokens = random_answer(grammar(json_object=True), seed, most=400)
        except AssertionError:
            continue
        assert isinstance(json.loads(written(tokens)), dict)
        return
    pytest.fail("no object came to its end")


def test_white_space_can_be_ruled_out() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": [1, 2]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }
    assert written(random_answer(grammar(json=schema, disable_any_whitespace=True), 0)) == (
        '{"a":1,"b":[1,2]}'
    )
    spaced = {written(random_answer(grammar(json=schema), seed)) for seed in range(9)}
    assert len(spaced) > 1
    for seed in range(9):
        text = written(random_answer(grammar(json=schema, whitespace_pattern=" "), seed))
        assert json.loads(text) == {"a": 1, "b": [1, 2]} and "\n" not in text
