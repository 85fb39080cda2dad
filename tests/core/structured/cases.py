"""What the tests of this folder share: a backend over the bundled tokenizer, random answers."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any

import jsonschema
import numpy as np

from dovetail.core.constraint import StructuredOutputsParams
from dovetail.core.demo import demo_model_path
from dovetail.core.structured.backend import Backend
from dovetail.core.structured.child import examine
from dovetail.core.structured.vocabulary import encoder, read_vocabulary
from dovetail.core.tokenizer import Tokenizer, load_tokenizer

EOS = 0
WIDTH = 4096 + 40
"""Of the logits: more than the tokenizer has."""

_CHECKER = jsonschema.FormatChecker(("date", "ipv4", "ipv6", "uuid", "email"))


@_CHECKER.checks("time")
def _is_time(value: object) -> bool:
    return bool(re.fullmatch(r"\d\d:\d\d:\d\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)", str(value)))


@_CHECKER.checks("date-time")
def _is_date_time(value: object) -> bool:
    return bool(
        re.fullmatch(r"\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d(\.\d+)?([zZ]|[+-]\d\d:\d\d)", str(value))
    )


@cache
def tokenizer() -> Tokenizer:
    return load_tokenizer(demo_model_path())


@cache
def backend() -> Backend:
    vocabulary = read_vocabulary(tokenizer(), WIDTH, [EOS])
    return Backend(vocabulary, encoder(tokenizer()))


def grammar(**form: Any) -> str:
    """The examined grammar of a form that must be a good one."""
    verdict = examine(StructuredOutputsParams(**form), backend())
    assert verdict.grammar, verdict.reason
    return verdict.grammar


def allowed(bits: np.ndarray) -> list[int]:
    """The tokens of one mask, read bit by bit."""
    return [t for t in range(32 * len(bits)) if bits[t // 32] >> (t % 32) & 1]


def random_answer(source: str, seed: int, most: int = 3000) -> list[int]:
    """Tokens drawn from random logits at temperature 2 under the mask, up to the end."""
    rng = np.random.default_rng(seed)
    matcher = backend().compile(source).deep_copy()
    bits = np.zeros((1, -(-WIDTH // 32)), np.int32)
    out: list[int] = []
    for _ in range(most):
        backend().fill([(matcher, 0, [])], bits)
        (some,) = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little")
        tokens = np.flatnonzero(some)
        logits = rng.normal(size=len(tokens)) / 2.0
        token = int(tokens[np.argmax(logits + rng.gumbel(size=len(tokens)))])
        assert matcher.consume_token(token), matcher.get_error()
        if token != EOS:
            out.append(token)
        if matcher.is_stopped():
            return out
    raise AssertionError("the answer does not end")


def written(tokens: list[int]) -> str:
    return b"".join(tokenizer().token_bytes(token) for token in tokens).decode()


def check_json(schema: dict[str, Any], text: str) -> None:
    """Raises unless the text is JSON that the schema allows, by another judge than ours."""
    kind = jsonschema.validators.validator_for(schema, default=jsonschema.Draft202012Validator)
    kind(schema, format_checker=_CHECKER).validate(json.loads(text))
