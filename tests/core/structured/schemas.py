"""JSON schemas of the kinds that the JSON Schema test suite has, all of them with short instances.

Strings, arrays and objects are bounded, so that an answer of random tokens comes to its end.
"""

from __future__ import annotations

import random
from typing import Any

Schema = dict[str, Any]


def obj(required: dict[str, Any], optional: dict[str, Any] | None = None, **more: Any) -> Schema:
    """A closed object."""
    return {
        "type": "object",
        "properties": {**required, **(optional or {})},
        "required": list(required),
        "additionalProperties": False,
        **more,
    }


def text(most: int = 8, **more: Any) -> Schema:
    return {"type": "string", "maxLength": most, **more}


def arr(items: Any, most: int = 3, **more: Any) -> Schema:
    return {"type": "array", "items": items, "maxItems": most, **more}


SMALL = {"type": "integer", "minimum": 0, "maximum": 9}
FLAG = {"type": "boolean"}
NODE = obj({"value": SMALL}, {"next": {"$ref": "#/$defs/node"}})
TREE = obj({"v": SMALL, "kids": {**arr({"$ref": "#/$defs/leaf"}, 2)}})

TYPES: list[Schema] = [
    {"type": "boolean"},
    {"type": "null"},
    {"type": "integer", "minimum": -5, "maximum": 5},
    {"type": "number", "minimum": 0, "maximum": 1},
    {"type": ["boolean", "null"]},
    {"type": ["integer", "null"], "minimum": 0, "maximum": 100},
    {"type": ["string", "boolean"], "maxLength": 5},
    text(),
    arr(FLAG),
    obj({}),
    obj({"a": FLAG}),
    {"type": "array", "maxItems": 0},
    {"type": "string", "maxLength": 0},
]

VALUES: list[Schema] = [
    {"const": 3},
    {"const": "only this"},
    {"const": None},
    {"const": True},
    {"const": [1, "two", None]},
    {"const": {"a": {"b": [1.5]}}},
    {"const": 'quote " and \\ and \n'},
    {"const": "é😀"},
    {"const": -0.5},
    {"const": ""},
    {"enum": ["red", "green", "blue"]},
    {"enum": [1, 2, 3]},
    {"enum": [None, False, 0, "", [], {}]},
    {"enum": ["a", "ab", "abc"]},
    {"enum": [{"k": 1}, {"k": 2}, [3]]},
    {"enum": ["é", "ü", "漢字", "😀"]},
    {"enum": ["single"]},
    {"type": "string", "enum": ["x", "y"]},
    {"type": "integer", "enum": [10, 20]},
    {"enum": ["with space", "tab\tinside", "line\nbreak"]},
    {"enum": [f"item {i}" for i in range(200)]},
    {"enum": list(range(-50, 50))},
]

NUMBERS: list[Schema] = [
    {"type": "integer", "minimum": 10, "maximum": 20},
    {"type": "integer", "minimum": -1000, "maximum": -10},
    {"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 3},
    {"type": "integer", "minimum": 0, "maximum": 0},
    {"type": "integer", "minimum": 99, "maximum": 1001},
    {"type": "integer", "minimum": -7, "maximum": 123456},
    {"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100},
    {"type": "integer", "multipleOf": 3, "minimum": 0, "maximum": 300},
    {"type": "number", "minimum": 1.5, "maximum": 2.5},
    {"type": "number", "minimum": -1, "maximum": 1},
    {"type": "number", "exclusiveMinimum": 0, "maximum": 10},
    {"type": "number", "minimum": 0.001, "maximum": 0.002},
    {"type": "number", "minimum": 100, "exclusiveMaximum": 1000},
    {"type": "number", "minimum": -273.15, "maximum": 0},
    obj({"lat": {"type": "number", "minimum": -90, "maximum": 90}}),
    obj({"n": {"type": "integer", "minimum": 1, "maximum": 65535}}),
    arr({"type": "integer", "minimum": 1, "maximum": 6}, 5, minItems=5),
]

STRINGS: list[Schema] = [
    text(5, minLength=5),
    text(10, minLength=1),
    text(1, minLength=1),
    text(20, minLength=19),
    {"type": "string", "pattern": "^[a-z]{3}$"},
    {"type": "string", "pattern": "^[A-Z][a-z]{1,5}$"},
    {"type": "string", "pattern": "^(foo|bar)-[0-9]{2}$"},
    {"type": "string", "pattern": "^\\d{4}-\\d{2}$"},
    {"type": "string", "pattern": "^a?b{0,3}c$"},
    {"type": "string", "pattern": '^[^"\\\\]{2}$'},
    {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
    {"type": "string", "pattern": "^(a|b|c){4}$"},
    {"type": "string", "pattern": "^$"},
    {"type": "string", "pattern": "^[äöü]{2}$"},
    {"type": "string", "pattern": "^\\w{2,4}@\\w{2,4}$"},
    {"type": "string", "pattern": "^[a-c]+$", "maxLength": 6},
    {"type": "string", "pattern": "^x", "maxLength": 4},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "time"},
    {"type": "string", "format": "date-time"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "duration"},
    {"type": "string", "format": "email", "maxLength": 30},
    {"type": "string", "format": "hostname", "maxLength": 30},
    {"type": "string", "format": "uri", "maxLength": 40},
]

ARRAYS: list[Schema] = [
    arr(SMALL, 4),
    arr(SMALL, 4, minItems=4),
    arr(text(3), 2, minItems=1),
    arr(arr(FLAG, 2), 2),
    arr(arr(arr(SMALL, 1), 1), 1),
    arr(obj({"a": SMALL}), 2, minItems=2),
    arr({"enum": ["a", "b"]}, 3),
    arr({"type": ["null", "boolean"]}, 3),
    {"type": "array", "prefixItems": [SMALL, FLAG], "items": False, "minItems": 2},
    {"type": "array", "prefixItems": [SMALL, text(2)], "items": FLAG, "maxItems": 4},
    {"type": "array", "prefixItems": [{"const": "tag"}, SMALL], "items": False, "minItems": 1},
    {"type": "array", "items": {"anyOf": [SMALL, FLAG]}, "minItems": 2, "maxItems": 3},
    {"type": "array", "items": False},
    obj({"rows": arr(arr(SMALL, 2, minItems=2), 2, minItems=2)}),
]

OBJECTS: list[Schema] = [
    obj({"name": text(), "age": SMALL}),
    obj({"name": text()}, {"age": SMALL, "email": text(4)}),
    obj({}, {"a": FLAG, "b": FLAG, "c": FLAG}),
    obj({"a": obj({"b": obj({"c": obj({"d": FLAG})})})}),
    obj({"a": obj({}, {"b": obj({}, {"c": SMALL})})}),
    obj({"with space": FLAG, "é": FLAG, 'quo"te': FLAG}),
    obj({"": FLAG}),
    obj({"list": arr(obj({"id": SMALL, "ok": FLAG}), 2), "total": SMALL}),
    {
        "type": "object",
        "properties": {"a": SMALL},
        "required": ["a"],
        "additionalProperties": FLAG,
        "maxProperties": 3,
    },
    {"type": "object", "additionalProperties": SMALL, "maxProperties": 2},
    {
        "type": "object",
        "patternProperties": {"^x_[a-z]{2}$": SMALL},
        "additionalProperties": False,
        "maxProperties": 2,
    },
    {
        "type": "object",
        "additionalProperties": SMALL,
        "minProperties": 1,
        "maxProperties": 2,
    },
    obj(
        {"a": FLAG},
        title="T",
        description="d",
        **{"$schema": "https://json-schema.org/draft/2020-12/schema"},
    ),
    obj({"kind": {"const": "circle"}, "r": SMALL}),
    obj({"a": {"default": 3, **SMALL}, "b": {"examples": ["x"], **text(3)}}),
    obj({f"field_{i}": FLAG for i in range(20)}),
    obj({}, {f"maybe_{i}": FLAG for i in range(8)}),
    obj({"id": {"type": "string", "format": "uuid"}, "at": {"type": "string", "format": "date"}}),
]

COMBINED: list[Schema] = [
    {"anyOf": [SMALL, FLAG]},
    {"anyOf": [text(4), {"type": "null"}]},
    {"anyOf": [obj({"a": SMALL}), obj({"b": FLAG})]},
    {"anyOf": [{"const": "x"}, arr(FLAG, 1), {"type": "null"}]},
    {"oneOf": [{"type": "boolean"}, {"type": "null"}]},
    {
        "oneOf": [
            obj({"kind": {"const": "a"}, "x": SMALL}),
            obj({"kind": {"const": "b"}, "y": FLAG}),
        ]
    },
    {"oneOf": [text(3), SMALL]},
    {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 8}]},
    {"allOf": [text(5), {"minLength": 2}]},
    {"allOf": [obj({"a": SMALL}, {"b": FLAG}), {"required": ["b"]}]},
    {"allOf": [{"enum": [1, 2, 3]}, {"enum": [2, 3, 4]}]},
    {"anyOf": [{"allOf": [{"type": "integer", "minimum": 0}, {"maximum": 3}]}, FLAG]},
    {"type": "object", "anyOf": [obj({"a": FLAG}), obj({"a": SMALL, "b": FLAG})]},
    obj({"v": {"anyOf": [obj({"n": SMALL}), arr(FLAG, 2), {"type": "null"}]}}),
    obj({"op": {"enum": ["add", "del"]}, "to": {"anyOf": [SMALL, {"type": "null"}]}}),
    {"anyOf": [{"type": "string", "pattern": "^a{1,3}$"}, {"type": "string", "format": "ipv4"}]},
    {"allOf": [{"type": "string", "pattern": "^[a-d]{1,6}$"}, {"minLength": 3}]},
]

REFERENCES: list[Schema] = [
    {"$ref": "#/$defs/a", "$defs": {"a": SMALL}},
    {"$defs": {"p": obj({"x": SMALL, "y": SMALL})}, **arr({"$ref": "#/$defs/p"}, 2)},
    {"definitions": {"c": {"enum": ["r", "g"]}}, **obj({"c": {"$ref": "#/definitions/c"}})},
    {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": FLAG}, "$ref": "#/$defs/a"},
    {"$defs": {"node": NODE}, "$ref": "#/$defs/node"},
    {"$defs": {"leaf": obj({"v": SMALL})}, **TREE},
    obj({"me": SMALL, "also": {"$ref": "#/properties/me"}}),
    {
        "$defs": {"tree": obj({"v": SMALL}, {"kids": arr({"$ref": "#/$defs/tree"}, 1)})},
        "$ref": "#/$defs/tree",
    },
    {
        "$defs": {
            "even": obj({"odd": {"anyOf": [{"$ref": "#/$defs/odd"}, {"type": "null"}]}}),
            "odd": obj({"even": {"anyOf": [{"$ref": "#/$defs/even"}, {"type": "null"}]}}),
        },
        "$ref": "#/$defs/even",
    },
    {
        "$defs": {
            "expr": {
                "anyOf": [
                    SMALL,
                    obj({"op": {"enum": ["+", "-"]}, "l": {"$ref": "#/$defs/expr"}, "r": SMALL}),
                ]
            }
        },
        "$ref": "#/$defs/expr",
    },
    {
        "$defs": {"a/b": FLAG, "c~d": SMALL},
        **obj({"x": {"$ref": "#/$defs/a~1b"}, "y": {"$ref": "#/$defs/c~0d"}}),
    },
    {
        "$defs": {"money": {"type": "string", "pattern": "^[0-9]{1,4}\\.[0-9]{2}$"}},
        "$ref": "#/$defs/money",
    },
]

HAND_WRITTEN = [
    *TYPES,
    *VALUES,
    *NUMBERS,
    *STRINGS,
    *ARRAYS,
    *OBJECTS,
    *COMBINED,
    *REFERENCES,
]


def generated(count: int, seed: int = 0) -> list[Schema]:
    """Random schemas, nested up to three deep."""
    rng = random.Random(seed)
    return [_object(rng, 3) for _ in range(count)]


def _object(rng: random.Random, depth: int) -> Schema:
    names = rng.sample(["id", "name", "kind", "tags", "size", "ok", "at", "parts", "note"], 4)
    each = {name: _any(rng, depth - 1) for name in names[: rng.randrange(1, 5)]}
    cut = rng.randrange(len(each) + 1)
    items = list(each.items())
    return obj(dict(items[:cut]), dict(items[cut:]))


def _any(rng: random.Random, depth: int) -> Schema:
    kinds = ["leaf"] * 3 + (["object", "array", "choice"] if depth > 0 else [])
    match rng.choice(kinds):
        case "object":
            return _object(rng, depth)
        case "array":
            least = rng.randrange(2)
            return arr(_any(rng, depth - 1), least + rng.randrange(3), minItems=least)
        case "choice":
            return {"anyOf": [_any(rng, depth - 1), {"type": "null"}]}
    return _leaf(rng)


def _leaf(rng: random.Random) -> Schema:
    low = rng.randrange(-100, 100)
    words = rng.sample(["red", "green", "blue", "a b", "é", "x\ny"], 3)
    return rng.choice(
        [
            {"type": "integer", "minimum": low, "maximum": low + rng.randrange(1000)},
            {"type": "number", "minimum": low, "maximum": low + rng.randrange(1, 50)},
            text(rng.randrange(1, 12)),
            text(9, minLength=rng.randrange(9)),
            {"type": "string", "pattern": f"^[a-f]{{{rng.randrange(1, 6)}}}$"},
            {"type": "string", "format": rng.choice(["date", "ipv4", "uuid", "time"])},
            {"enum": words},
            {"const": rng.choice(words)},
            FLAG,
            {"type": ["null", "boolean"]},
        ]
    )
