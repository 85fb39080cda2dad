"""Finding out whose fault a failed step was."""

from __future__ import annotations

from collections.abc import Iterable

from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.update import Update

__all__ = ["Suspects"]


class Suspects:
    """Sequences of a step that failed. Each runs alone until it has a token, or fails."""

    def __init__(self) -> None:
        self._sequences: list[Sequence] = []

    def __len__(self) -> int:
        return len(self._sequences)

    def first(self) -> Sequence:
        """The one to run alone now."""
        return self._sequences[0]

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Suspect these too."""
        self._sequences += [s for s in sequences if s not in self._sequences]

    def acquit(self, updates: Iterable[Update]) -> None:
        """These got through a step."""
        ids = {update.id for update in updates}
        self._sequences = [s for s in self._sequences if s.request.id not in ids]

    def forget(self, sequence: Sequence) -> None:
        """It has ended."""
        if sequence in self._sequences:
            self._sequences.remove(sequence)
