"""The bytes that each token stands for: what a grammar over text needs to know of a tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from dovetail.core.errors import RequestError
from dovetail.core.tokenizer import Tokenizer

__all__ = ["Encode", "Vocabulary", "encoder", "read_vocabulary"]

_SAMPLES = 500
"""Pairs of tokens whose text is compared with that of the two one by one."""
_SENTINEL = "\x02"
"""No tokenizer joins this with what follows, and hardly any has it inside a token."""

Encode = Callable[[bytes], list[int]]


class Vocabulary(msgspec.Struct, frozen=True, kw_only=True):
    """All tokens that can be sampled; plain data that any process can be given."""

    tokens: list[bytes]
    """As many as the logits are wide; empty where a token has no text, and is never allowed."""
    special: list[int]
    """Tokens that are no text, whatever their name: no part of an answer but its end."""
    ends: list[int]
    """End-of-text tokens: allowed where the answer is complete."""


def read_vocabulary(tokenizer: Tokenizer, width: int, ends: Sequence[int]) -> Vocabulary:
    """Ask the tokenizer for every token.

    Args:
        tokenizer: Of the served model.
        width: V, of the logits; may be more or less than the tokenizer has.
        ends: The model's end-of-text tokens.

    Raises:
        RequestError: The text of this tokenizer's tokens depends on their neighbours.
    """
    known = min(width, tokenizer.vocab_size)
    tokens = [tokenizer.token_bytes(i) for i in range(known)]
    special = {i for i in tokenizer.special_token_ids if i < width} | {e for e in ends if e < width}
    _check_bytes(tokenizer, tokens, special)
    return Vocabulary(
        tokens=tokens + [b""] * (width - known),
        special=sorted(special),
        ends=[e for e in dict.fromkeys(ends) if e < width],
    )


def _check_bytes(tokenizer: Tokenizer, tokens: list[bytes], special: set[int]) -> None:
    """Whether tokens stand for bytes one by one, tried on pairs spread over the vocabulary."""
    plain = [i for i, text in enumerate(tokens) if text and i not in special]
    anchor = next((i for i in plain if tokens[i] == b"a"), None)
    if anchor is None:
        raise _unfit("it has no token for each letter")
    for i in plain[:: max(1, len(plain) // _SAMPLES)]:
        expected = (b"a" + tokens[i] + b"a").decode(errors="replace")
        text = tokenizer.decode([anchor, i, anchor], skip_special_tokens=False)
        if text != expected and "\ufffd" not in expected:
            raise _unfit(f"the bytes of its token {i} ({tokens[i]!r}) depend on its neighbours")


def _unfit(reason: str) -> RequestError:
    return RequestError(
        f"structured_outputs is not possible with this model's tokenizer: {reason}.",
        param="structured_outputs",
        code="unsupported",
    )


def encoder(tokenizer: Tokenizer) -> Encode:
    """How a tokenizer writes a text in the middle of an answer: without what begins a text."""
    before = tokenizer.encode(_SENTINEL, add_special_tokens=False)

    def encode(text: bytes) -> list[int]:
        ids = tokenizer.encode(_SENTINEL + text.decode(errors="replace"), add_special_tokens=False)
        return ids[len(before) :] if ids[: len(before)] == before else []

    return encode
