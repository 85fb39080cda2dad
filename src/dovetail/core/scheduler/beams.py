"""Beam searches among the running sequences: every live beam is a sequence of its own.

Beams that were one share the blocks of what they have in common. A beam whose step is done rests,
in its row if it can, until the last one of its group is; then the group chooses, and each beam
ends, goes on where it is, or goes on and is forked as well.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Protocol

import msgspec
import numpy as np

from dovetail.core.errors import InvariantError
from dovetail.core.request import Request
from dovetail.core.scheduler.blocks import SequenceBlocks
from dovetail.core.scheduler.hypotheses import Beam, BeamGroup, Continuation
from dovetail.core.scheduler.prepared import PreparedQueue
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.scheduler.settings import SchedulerStats
from dovetail.core.types import IntArray
from dovetail.core.update import Update

__all__ = ["BeamSearches"]


class _End(Protocol):
    """Forgets a sequence; ``is_bad``: its KV must not be found by others."""

    def __call__(self, sequence: Sequence, *, is_bad: bool = False) -> None: ...


class BeamSearches:
    """The beam searches of one scheduler, whose state it changes.

    Its sequences have negative ids, which nobody outside sees: what a search says goes out under
    the id of its request.

    Args:
        table: The rows.
        blocks: For forking.
        waiting: Gets the sequences that need a row.
        sequences: All sequences by id; the beams are entered there.
        stats: Searches that end are counted there.
        end: Takes a sequence out of all of these.
    """

    def __init__(
        self,
        table: RowTable,
        blocks: SequenceBlocks,
        waiting: PreparedQueue,
        sequences: dict[int, Sequence],
        stats: SchedulerStats,
        *,
        end: _End,
    ) -> None:
        self._table = table
        self._blocks = blocks
        self._waiting = waiting
        self._sequences = sequences
        self._stats = stats
        self._forget = end
        self._groups: dict[int, BeamGroup] = {}
        self._next_id: Callable[[], int] = count(-1, -1).__next__
        self._took = False
        """Something was taken in since ``public`` was called last."""

    def add(self, request: Request) -> None:
        """Begin a search with one beam, the prompt."""
        group = self._groups[request.id] = BeamGroup(request)
        params = msgspec.structs.replace(
            request.params, n=1, best_of=None, logprobs=2 * group.width
        )
        own = msgspec.structs.replace(
            request, id=self._next_id(), params=params, stop_token_ids=[], parent=None
        )
        root = Sequence(own)
        root.beam = Beam(group, root)
        group.live = [root.beam]
        self._sequences[own.id] = root
        self._waiting.push(root)

    def has(self, request_id: int) -> bool:
        """Whether there is a search of this id."""
        return request_id in self._groups

    def __len__(self) -> int:
        return len(self._groups)

    def abort(self, request_id: int) -> bool:
        """End a search without an outcome; False if there is none of this id."""
        group = self._groups.get(request_id)
        if group is None:
            return False
        self._end(group)
        return True

    def take(self, sequence: Sequence, update: Update, updates: list[Update]) -> None:
        """Take in what a step or a failure says of a beam.

        Args:
            sequence: A beam; nothing happens if its search has ended meanwhile.
            update: What was said, with log-probabilities unless it failed.
            updates: What to tell the users; the end of the search is added.
        """
        self._took = True
        beam = sequence.beam
        if beam is None or beam.group.request.id not in self._groups:
            return
        group = beam.group
        if update.error is not None:
            self._end(group, is_bad=True)
            self._stats.num_failed += 1
            updates.append(msgspec.structs.replace(update, id=group.request.id))
            return
        if sequence.row is None or not update.logprobs:
            raise InvariantError("engine", "a beam's step gave no log-probabilities")
        self._table.retract_token(sequence.row)
        beam.candidates = update.logprobs[0]
        if group.is_ready:
            self._advance(group, updates)

    def public(self, updates: list[Update]) -> list[Update]:
        """Without those of single beams."""
        if not self._took:
            return updates
        self._took = False
        return [update for update in updates if update.id >= 0]

    def resting_in_row(self) -> Sequence | None:
        """A beam that has a row it does not need now."""
        if not self._groups:
            return None
        rows = self._table.order[::-1].tolist()
        return next((s for row in rows if (s := self._table.at(row)).rests), None)

    def _end(self, group: BeamGroup, *, is_bad: bool = False) -> None:
        del self._groups[group.request.id]
        for beam in group.live:
            self._forget(beam.sequence, is_bad=is_bad)

    def _advance(self, group: BeamGroup, updates: list[Update]) -> None:
        chosen = group.advance()
        if not chosen:
            self._end(group)
            self._stats.num_finished += 1
            outcome = group.outcome()
            updates.append(
                Update(
                    id=group.request.id,
                    token_ids=[],
                    finish_reason=outcome[0].finish_reason if outcome else "stop",
                    num_cached_tokens=group.live[0].sequence.num_cached_tokens,
                    beams=outcome,
                )
            )
            return
        following: dict[int, Beam] = {}
        for beam in group.live:
            mine = [place for place, step in enumerate(chosen) if step.beam is beam]
            if not mine:
                self._forget(beam.sequence)
                continue
            for place in mine[1:]:
                following[place] = self._fork(beam.sequence, chosen[place])
            following[mine[0]] = self._go_on(beam.sequence, chosen[mine[0]])
        group.live = [following[place] for place in range(len(chosen))]

    def _go_on(self, sequence: Sequence, step: Continuation) -> Beam:
        """Give the sequence of a beam its next token."""
        sequence.beam = Beam(step.beam.group, sequence, step.path(), step.cumulative_logprob)
        if sequence.row is not None:
            self._table.append_token(sequence.row, step.token_id)
        else:
            sequence.token_ids = _followed(sequence.token_ids, step.token_id)
            self._waiting.push(sequence)
        return sequence.beam

    def _fork(self, parent: Sequence, step: Continuation) -> Beam:
        """Let a second sequence go on from a beam, with the same blocks if it has any."""
        tokens, row = parent.token_ids, parent.row
        if row is not None:
            tokens = self._table.tokens[row, : self._table.num_known[row]]
        request = msgspec.structs.replace(parent.request, id=self._next_id())
        child = Sequence(request, _followed(tokens, step.token_id))
        child.has_started = True
        child.num_cached_tokens = parent.num_cached_tokens
        child.beam = Beam(step.beam.group, child, step.path(), step.cumulative_logprob)
        if row is not None:
            self._blocks.fork(parent, child, int(self._table.num_computed[row]))
        self._sequences[request.id] = child
        self._waiting.push(child)
        return child.beam


def _followed(tokens: IntArray, token_id: int) -> IntArray:
    return np.append(tokens, np.int32(token_id))
