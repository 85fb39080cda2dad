"""Repetition, frequency and presence penalties, at a cost that grows with what a row has said.

A row's state is how often its output holds each token (V counts) and the tokens that it has seen
at all, prompt and output; only the logits of the latter are touched.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dovetail.core.batch import JoinedRow
from dovetail.core.types import IntArray
from dovetail.platforms.torch.sampling.rows import Which, on_device

__all__ = ["Penalties"]


class Penalties:
    """State of the rows that have a penalty. Grows when it must, up to ``max_rows``."""

    def __init__(self, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._device = device
        self._free = list(range(max_rows))[::-1]
        self._slots: dict[int, int] = {}
        self._lengths = np.zeros(max_rows, np.int64)
        self._counts = torch.zeros(0, vocab_size, dtype=torch.int32, device=device)
        self._seen = torch.zeros(0, 256, dtype=torch.int64, device=device)
        """Token ids, in any order and with repeats; the rest of a row repeats its first."""
        self._strength = torch.zeros(0, 3, device=device)
        """Repetition, frequency, presence."""

    def drop(self, row: int) -> None:
        """Forget the row, if it is known."""
        slot = self._slots.pop(row, None)
        if slot is not None:
            self._free.append(slot)

    def join(self, row: JoinedRow) -> None:
        """Begin with the row's prompt and the tokens generated before; nothing if no penalty."""
        params = row.params
        strength = (params.repetition_penalty, params.frequency_penalty, params.presence_penalty)
        if strength == (1.0, 0.0, 0.0):
            return
        slot = self._slots[row.row] = self._free.pop()
        seen = np.unique(row.token_ids).astype(np.int64)
        self._lengths[slot] = len(seen)
        self._reserve(slot + 1, len(seen))
        self._seen[slot] = int(seen[0])
        self._seen[slot, : len(seen)] = on_device(seen, self._device)
        self._strength[slot] = on_device(np.array(strength, np.float32), self._device)
        output, times = np.unique(row.token_ids[row.num_prompt_tokens :], return_counts=True)
        self._counts[slot] = 0
        ids = self._tensor(output)
        self._counts[slot, ids] = on_device(times.astype(np.int32), self._device)

    def apply(self, logits_NV: Tensor, rows: Which) -> None:
        """Penalise the float32 logits of the rows (n,) in place; the formula is vLLM's."""
        place, slots, lengths = self._find(rows)
        if not len(place):
            return
        at = self._tensor(slots)
        ids = self._seen[at, : int(lengths.max())]
        x = logits_NV[(index := self._tensor(place)[:, None]), ids]
        count = self._counts[at[:, None], ids]
        repetition, frequency, presence = self._strength[at].unsqueeze(-1).unbind(1)
        x = torch.where(x > 0, x / repetition, x * repetition)
        x -= frequency * count
        x -= presence * (count > 0)
        logits_NV[index, ids] = x

    def update(self, rows: Which, token_ids_N: Tensor) -> None:
        """Add one output token to each of the rows that have a penalty."""
        place, slots, lengths = self._find(rows)
        if not len(place):
            return
        self._reserve(0, int(lengths.max()) + 1)
        at, tokens = self._tensor(slots), token_ids_N[self._tensor(place)]
        self._counts[at, tokens] += 1
        self._seen[at, self._tensor(lengths)] = tokens
        self._lengths[slots] += 1

    def _find(self, rows: Which) -> tuple[IntArray, IntArray, IntArray]:
        """Of the rows with a penalty: their places among ``rows``, slots, and lengths."""
        found = [(i, self._slots[r]) for i, r in enumerate(rows.tolist()) if r in self._slots]
        place, slots = np.array(found, np.int32).reshape(-1, 2).T
        return place, slots, self._lengths[slots].astype(np.int32)

    def _tensor(self, array: Which) -> Tensor:
        return on_device(array.astype(np.int64), self._device)

    def _reserve(self, num_slots: int, length: int) -> None:
        """Make room for so many slots and so many seen tokens in each, at least doubling."""
        have, width = self._seen.shape
        if num_slots > have:
            more = max(num_slots, 2 * have, 4) - have
            self._counts = _grown(self._counts, more)
            self._strength = _grown(self._strength, more)
            self._seen = _grown(self._seen, more)
        if length > width:
            more = max(length, 2 * width) - width
            self._seen = torch.cat((self._seen, self._seen[:, :1].expand(-1, more)), 1)


def _grown(table: Tensor, more: int) -> Tensor:
    return torch.cat((table, table.new_zeros(more, *table.shape[1:])))
