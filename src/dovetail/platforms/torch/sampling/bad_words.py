"""Words that may not be said: the last token of each, where those before it were just generated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import JoinedRow
from dovetail.platforms.torch.sampling.rows import Which, on_device

__all__ = ["BadWords"]

_ANY, _NONE = -1, -2
"""In a word: any token will do. In a window: there was no token yet."""


@dataclass
class _Row:
    """The words of one row, and its last tokens, on the device."""

    heads: Tensor
    """(W, L) int32: all but the last token of each word, aligned to the right."""
    last: Tensor
    """(W,) int64"""
    window: Tensor
    """(L,) int32: the last tokens of the output."""


class BadWords:
    """State of the rows that have such words.

    Args:
        vocab_size: V. A word with a token outside it can never be said, and is left out.
        device: Where the logits are.
    """

    def __init__(self, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device
        self._rows: dict[int, _Row] = {}

    def drop(self, row: int) -> None:
        """Forget the row, if it is known."""
        self._rows.pop(row, None)

    def join(self, row: JoinedRow) -> None:
        """Begin with the tokens that the row generated before; nothing if it has no words."""
        words = [w for w in row.params.bad_words_token_ids or () if max(w) < self._vocab_size]
        if not words:
            return
        length = max(len(word) for word in words) - 1
        heads = np.full((len(words), length), _ANY, np.int32)
        for i, word in enumerate(words):
            heads[i, length - len(word) + 1 :] = word[:-1]
        output = row.token_ids[row.num_prompt_tokens :]
        window = np.full(length, _NONE, np.int32)
        count = min(length, len(output))
        window[length - count :] = output[len(output) - count :]
        self._rows[row.row] = _Row(
            heads=on_device(heads, self._device),
            last=on_device(np.array([word[-1] for word in words], np.int64), self._device),
            window=on_device(window, self._device),
        )

    def apply(self, logits_V: Tensor, row: int) -> None:
        """Forbid, in place, what would complete a word."""
        state = self._rows.get(row)
        if state is None:
            return
        matches = ((state.heads == _ANY) | (state.heads == state.window)).all(-1)
        zero = torch.zeros((), device=self._device)
        logits_V.index_add_(0, state.last, torch.where(matches, -torch.inf, zero))

    def update(self, rows: Which, token_ids_N: Tensor) -> None:
        """Add one output token to each of the rows that have words."""
        if not self._rows:
            return
        for place, row in enumerate(rows.tolist()):
            state = self._rows.get(row)
            if state is not None and len(state.window):
                token = token_ids_N[place : place + 1].to(torch.int32)
                state.window = torch.cat((state.window[1:], token))
