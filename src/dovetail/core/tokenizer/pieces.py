"""What bytes each token stands for, where a tokenizer's decoder works token by token.

Two families do, and nearly every language model belongs to one of them:

- byte-level BPE (GPT-2, Llama 3, Qwen): each character of a token is one byte;
- SentencePiece style (Llama 2, Mistral, Gemma): a token is text with U+2581 for a space, or one
  byte written ``<0x0A>``.

Decoding is then a table look-up and an incremental UTF-8 decoder: exact at every split, with a
cost per token that does not depend on what went before.
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["ByteRule", "TokenTable", "byte_rule"]

PER_BYTE = "dovetail.replace-each-byte"
"""The codec error handler that gives one U+FFFD per byte, as the ``ByteFallback`` decoder does."""


@dataclass(frozen=True)
class ByteRule:
    """How the text of tokens follows from their names in the vocabulary."""

    to_bytes: Callable[[str], bytes]
    errors: str
    """The codec error handler for bytes that are no UTF-8."""
    num_stripped: int = 0
    """Spaces that the very beginning of a text loses."""


class TokenTable(dict[int, bytes]):
    """The bytes of each token, worked out when first asked for. Unknown ids have none.

    Args:
        name_of: The token's name in the vocabulary, or None.
        to_bytes: See ``ByteRule``.
        left_out: Tokens that shall have no text.
    """

    def __init__(
        self,
        name_of: Callable[[int], str | None],
        to_bytes: Callable[[str], bytes],
        left_out: frozenset[int] = frozenset(),
    ) -> None:
        super().__init__(dict.fromkeys(left_out, b""))
        self._name_of = name_of
        self._to_bytes = to_bytes

    def __missing__(self, token_id: int) -> bytes:
        if not 0 <= token_id < 1 << 32:
            return b""
        name = self._name_of(token_id)
        self[token_id] = value = b"" if name is None else self._to_bytes(name)
        return value


def byte_rule(decoder: Mapping[str, Any] | None) -> ByteRule | None:
    """The rule of a ``decoder`` as ``tokenizer.json`` describes it; None if it has no such rule."""
    steps = _flat(decoder)
    kinds = [step["type"] for step in steps]
    if kinds == ["ByteLevel"]:
        return ByteRule(_byte_level, "replace")
    if kinds[:3] != ["Replace", "ByteFallback", "Fuse"] or steps[0]["pattern"] != {"String": "▁"}:
        return None
    if steps[0]["content"] != " ":
        return None
    rest = steps[3:]
    if not rest:
        return ByteRule(_sentencepiece, PER_BYTE)
    match rest:
        case [{"type": "Strip", "content": " ", "start": int(num_stripped), "stop": 0}]:
            return ByteRule(_sentencepiece, PER_BYTE, num_stripped)
    return None


def _flat(decoder: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    if decoder is None:
        return []
    if decoder["type"] != "Sequence":
        return [decoder]
    return [step for part in decoder["decoders"] for step in _flat(part)]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: printable Latin-1 stands for itself, the rest is moved to U+0100 and after."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    moved = [byte for byte in range(256) if byte not in set(printable)]
    return alphabet | {chr(256 + i): byte for i, byte in enumerate(moved)}


_ALPHABET = _byte_alphabet()


def _byte_level(name: str) -> bytes:
    try:
        return bytes([_ALPHABET[char] for char in name])
    except KeyError:
        return name.encode()


def _sentencepiece(name: str) -> bytes:
    if len(name) == 6 and name.startswith("<0x") and name.endswith(">"):
        try:
            return bytes([int(name[3:5], 16)])
        except ValueError:
            return name.encode()
    return name.replace("▁", " ").encode()


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeDecodeError):
        raise error
    return "\ufffd" * (error.end - error.start), error.end


codecs.register_error(PER_BYTE, _replace_each_byte)
