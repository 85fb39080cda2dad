"""Turns what users write for an option into its one normal form.

Each parser raises ValueError whose text says what is allowed, to follow "must be".
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

__all__ = [
    "byte_size",
    "count",
    "flag",
    "fraction",
    "integer",
    "mapping",
    "maybe",
    "names",
    "seconds",
    "text",
]

_SUFFIX = {
    "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40,
}  # fmt: skip
_HUMAN = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtKMGT]?)")
_YES = {"true": True, "yes": True, "on": True, "1": True}
_NO = {"false": False, "no": False, "off": False, "0": False}


def text(value: Any) -> str:
    """A string, or a path."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    raise ValueError("a string")


def integer(value: Any) -> int:
    """A whole number of either sign, without suffix."""
    number = value
    if isinstance(value, str) and re.fullmatch(r"[+-]?\d+", value.strip()):
        number = int(value)
    if type(number) is not int:
        raise ValueError("a whole number")
    return number


def count(least: int = 1) -> Callable[[Any], int]:
    """A whole number of at least ``least``; 25.6k is 25,600 and 1K is 1,024."""
    allowed = f"a whole number of at least {least} (25.6k means 25,600; 1K means 1,024)"

    def parse(value: Any) -> int:
        number = _human(value) if isinstance(value, str) else value
        if type(number) is not int or number < least:
            raise ValueError(allowed)
        return number

    return parse


def byte_size(value: Any) -> int:
    """Bytes; 2g is 2,000,000,000 and 2G is 2,147,483,648, with or without a final B or iB."""
    allowed = "a number of bytes above 0, such as 2g (10^9 each) or 2G (2^30 each)"
    if isinstance(value, str):
        value = _human(re.sub(r"(?<=[kmgtKMGT])i?[bB]$", "", value.strip()))
    if type(value) is not int or value < 1:
        raise ValueError(allowed)
    return value


def _human(value: str) -> int | None:
    """The number that ``value`` stands for; None if it is not one, or not a whole one."""
    match = _HUMAN.fullmatch(value.strip().replace("_", ""))
    if match is None:
        return None
    number = float(match[1]) * _SUFFIX.get(match[2], 1)
    return round(number) if abs(number - round(number)) < 1e-6 else None


def fraction(value: Any) -> float:
    """A share above 0 and at most 1."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not 0 < number <= 1:
        raise ValueError("a fraction above 0 and at most 1")
    return number


def seconds(value: Any) -> float:
    """A time above 0."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = 0.0
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ValueError("a number of seconds above 0")
    return number


def flag(value: Any) -> bool:
    """True or false, in any of the words that configuration files use."""
    if isinstance(value, bool):
        return value
    word = {**_YES, **_NO}.get(value.strip().lower()) if isinstance(value, str) else None
    if word is None:
        raise ValueError("true or false")
    return word


def names(value: Any) -> tuple[str, ...]:
    """One string, or several; None means none."""
    if value is None:
        return ()
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) and v for v in value):
        raise ValueError("a string or several strings")
    return tuple(value)


def mapping(value: Any) -> dict[str, Any]:
    """A dict, or a JSON object as text; None means empty."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"a JSON object ({error})") from None
    if not isinstance(value, Mapping) and value is not None:
        raise ValueError("a JSON object")
    return dict(value or {})


def maybe(parse: Callable[[Any], Any], *, words: tuple[str, ...] = ("none",)) -> Any:
    """``parse``, where None, or one of ``words``, means that the engine decides."""

    def parse_optional(value: Any) -> Any:
        if value is None or str(value).strip().lower() in words:
            return None
        return parse(value)

    return parse_optional
