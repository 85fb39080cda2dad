"""Incremental detokenisation.

``tokenizers.decoders.DecodeStream`` is not used: it raises when bytes turn out not to be UTF-8,
and each step costs as much as all tokens since the last text did (a run of end-of-text tokens
under ``ignore_eos``, or of invalid bytes, takes quadratic time).
"""

from __future__ import annotations

import codecs
from collections.abc import Callable, Sequence

from dovetail.core.tokenizer.pieces import TokenTable

__all__ = ["ByteStream", "WindowStream"]

_CONTEXT = 8
"""Tokens of the prompt that may reach into the text that follows: more than a character has."""
_MAX_HELD = 16
"""Tokens after which text that still ends in U+FFFD is taken to be invalid, not unfinished."""


class ByteStream:
    """Looks each token's bytes up. Exact, and the cost of a step does not depend on the past.

    Args:
        table: The bytes of each token, none for those to be left out.
        errors: The codec error handler for invalid bytes.
        num_stripped: Spaces that the very beginning of a text loses.
        prompt_token_ids: What went before; its text is not returned.
    """

    __slots__ = ("_decode", "_num_stripped", "_table")

    def __init__(
        self,
        table: TokenTable,
        errors: str,
        num_stripped: int = 0,
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._table = table
        self._decode = codecs.getincrementaldecoder("utf-8")(errors).decode
        tail = _last_bytes(table, prompt_token_ids)
        self._num_stripped = 0 if tail else num_stripped
        self._decode(tail)

    def step(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete."""
        table = self._table
        if len(ids) == 1:
            text = self._decode(table[ids[0]])
        else:
            text = self._decode(b"".join([table[token_id] for token_id in ids]))
        return self._strip(text) if self._num_stripped and text else text

    def flush(self) -> str:
        """U+FFFD if the sequence ended inside a character."""
        return self._decode(b"", True)

    def _strip(self, text: str) -> str:
        num_spaces = len(text) - len(text.lstrip(" "))
        num_stripped = min(num_spaces, self._num_stripped)
        self._num_stripped = self._num_stripped - num_stripped if num_spaces == len(text) else 0
        return text[num_stripped:]


def _last_bytes(table: TokenTable, ids: Sequence[int]) -> bytes:
    """At least the last four bytes of the text of ``ids``, if it has as many."""
    tail = b""
    for token_id in reversed(ids):
        tail = table[token_id] + tail
        if len(tail) >= 4:
            break
    return tail


class WindowStream:
    """Decodes a short window of tokens again and again: for any decoder, at a higher cost.

    The text of the new tokens is what the window has more than it had without them. Invalid bytes
    that last for more than 16 tokens may come out as another number of U+FFFD than in the whole.

    Args:
        decode: The text of a list of tokens.
        left_out: Tokens that shall have no text.
        prompt_token_ids: What went before; its text is not returned.
    """

    __slots__ = ("_decode", "_left_out", "_num_shown", "_shown", "_window")

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        left_out: frozenset[int] = frozenset(),
        prompt_token_ids: Sequence[int] = (),
    ) -> None:
        self._decode = decode
        self._left_out = left_out
        self._window = [i for i in prompt_token_ids[-_CONTEXT:] if i not in left_out]
        self._num_shown = self._num_whole()
        self._shown = decode(self._window) if self._window else ""

    def step(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete."""
        return "".join([self._push(i) for i in ids if i not in self._left_out])

    def flush(self) -> str:
        """What was held back, unfinished characters as U+FFFD."""
        return self._take(self._decode(self._window)) if self._window else ""

    def _num_whole(self) -> int:
        """Tokens of the prompt up to the last one that ends with a character, if that is near."""
        for num_tokens in range(len(self._window), max(0, len(self._window) - 4), -1):
            if not self._decode(self._window[:num_tokens]).endswith("\ufffd"):
                return num_tokens
        return len(self._window)

    def _push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if self._shown.endswith("\ufffd") and not text.startswith(self._shown):
            self._shown = self._shown.rstrip("\ufffd")  # The prompt ended inside a character.
        num_held = len(self._window) - self._num_shown
        unfinished = text.endswith("\ufffd") or len(text) <= len(self._shown)
        return "" if unfinished and num_held < _MAX_HELD else self._take(text)

    def _take(self, text: str) -> str:
        """Return what is new in ``text``; keep only the tokens that made it as the next context."""
        new = text[len(self._shown) :]
        if new:
            del self._window[: self._num_shown]
        else:
            del self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window) if self._window else ""
        return new
