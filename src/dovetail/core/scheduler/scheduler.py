"""Continuous batching: decides each step, and takes in what it produced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from dovetail.core.batch import Batch, JoinedRow, StepOutput
from dovetail.core.errors import InvariantError
from dovetail.core.kv.pool import BlockPool
from dovetail.core.request import Request
from dovetail.core.scheduler.assemble import assemble_batch
from dovetail.core.scheduler.blocks import SequenceBlocks
from dovetail.core.scheduler.masking import advance_grammars
from dovetail.core.scheduler.prepared import PreparedQueue
from dovetail.core.scheduler.results import sequence_updates
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.sequence import (
    FirstComeQueue,
    PriorityQueue,
    Sequence,
    WaitingQueue,
)
from dovetail.core.structured.base import Grammars, NoGrammars
from dovetail.core.types import IntArray
from dovetail.core.update import Update

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerStats"]

_NO_ROWS = np.zeros(0, np.int32)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig:
    """Limits and policies, all decided."""

    num_blocks: int
    """Size of the pool, block 0 included."""
    block_size: int
    max_model_len: int
    max_num_seqs: int
    max_num_batched_tokens: int
    vocab_size: int
    enable_prefix_caching: bool = True
    enable_chunked_prefill: bool = True
    mixed_batches: bool = True
    """Prefill and decode may share a step; otherwise they take turns."""
    policy: str = "fcfs"
    """``fcfs`` or ``priority``."""


@dataclass(kw_only=True)
class SchedulerStats:
    """Counters since start."""

    num_steps: int = 0
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0


@dataclass(kw_only=True)
class _Plan:
    """A step in the making."""

    rows: IntArray
    grants: IntArray
    """Tokens that each row computes."""
    joined: list[JoinedRow] = field(default_factory=list)
    copies: list[tuple[int, int]] = field(default_factory=list)


class Scheduler:
    """Owns the pool, the rows and the queue. Deterministic: the same calls give the same batches.

    ``schedule`` may be called again before ``update`` was called for the step before (one step
    ahead). It returns None if there is nothing to do, or if steps under way must come in first.

    Args:
        config: Limits and policies.
        grammars: Of the requests that have one. None: none has.
    """

    def __init__(self, config: SchedulerConfig, grammars: Grammars | None = None) -> None:
        self.config = config
        self.grammars: Grammars = NoGrammars() if grammars is None else grammars
        self.pool = BlockPool(config.num_blocks)
        self.table = RowTable(
            config.max_num_seqs, config.max_model_len, config.block_size, config.vocab_size
        )
        self.blocks = SequenceBlocks(
            self.pool, self.table, prefix_caching=config.enable_prefix_caching
        )
        queue: WaitingQueue = PriorityQueue() if config.policy == "priority" else FirstComeQueue()
        self.waiting = PreparedQueue(queue, self.grammars)
        self.sequences: dict[int, Sequence] = {}
        self.stats = SchedulerStats()
        self._under_way: dict[int, npt.NDArray[np.int64]] = {}
        """Epochs of the rows of each step that was scheduled and has not come in."""
        self._suspects: list[Sequence] = []
        """Sequences of a step that failed: each runs alone until it has a token, or fails."""
        self._to_clean: list[int] = []
        """Blocks that may hold NaN: overwritten with block 0 before anybody gets them."""
        self._last_was_prefill = False

    def add(self, request: Request) -> None:
        """Take up a request. It was validated: it fits the model's context and the pool."""
        sequence = Sequence(request)
        self.sequences[request.id] = sequence
        parent = self.sequences.get(request.parent) if request.parent is not None else None
        if parent is not None and not request.emitted and not parent.has_started:
            parent.children.append(sequence)
        else:
            self.waiting.push(sequence)

    def abort(self, ids: list[int]) -> None:
        """Forget these requests; unknown ids are ignored, for they may just have ended."""
        for request_id in ids:
            if (sequence := self.sequences.get(request_id)) is not None:
                self._end(sequence)

    def has_work(self) -> bool:
        """Whether any request is here."""
        return bool(self.sequences)

    @property
    def num_running(self) -> int:
        """Requests that have a row."""
        return len(self.table.order)

    @property
    def num_waiting(self) -> int:
        """Requests that wait for a row."""
        return len(self.sequences) - len(self.table.order)

    def schedule(self) -> Batch | None:
        """Decide the next step: running rows first (decode before prefill), then new ones."""
        if self._suspects:
            return self._schedule_alone(self._suspects[0])
        for decode, prefill in self._turns():
            plan = self._plan_running(decode, prefill)
            if plan is None:
                return None
            if prefill:
                self._admit(plan)
            if len(plan.rows):
                return self._start(plan)
        if not self._under_way:
            self.waiting.rest()
        return None

    def _turns(self) -> tuple[tuple[bool, bool], ...]:
        """Which of (decode, prefill) may share the step, in the order in which to try."""
        if self.config.mixed_batches:
            return ((True, True),)
        turns = ((False, True), (True, False))
        return turns[::-1] if self._last_was_prefill else turns

    def _plan_running(self, decode: bool, prefill: bool) -> _Plan | None:
        """The part of the step that rows have a claim to; None if steps under way come first.

        Where blocks run out, the last sequence in the policy's order goes back to the queue, but
        only once nothing is under way: then all its tokens are known.
        """
        rows, grants = self._grant_running(decode, prefill)
        while (missing := self.blocks.missing(rows, grants)) > self.pool.num_free:
            if self._under_way:
                return None
            self._preempt(self._victim())
            rows, grants = self._grant_running(decode, prefill)
        plan = _Plan(rows=rows, grants=grants)
        if missing:
            plan.copies = self.blocks.extend(rows, grants)
        return plan

    def _grant_running(self, decode: bool, prefill: bool) -> tuple[IntArray, IntArray]:
        """Running rows that compute something, and how many tokens each."""
        table, order = self.table, self.table.order
        num_tokens = table.num_tokens[order]
        wanted = num_tokens - table.num_computed[order]
        wanted[num_tokens >= table.total[order]] = 0
        if self._under_way:
            wanted[table.needs_known[order] & (num_tokens > table.num_known[order])] = 0
        grants = np.where(wanted == 1, 1 if decode else 0, 0).astype(np.int32)
        long = wanted > 1
        if prefill and long.any():
            left = self.config.max_num_batched_tokens - int(grants.sum())
            for i in np.flatnonzero(long).tolist():
                grants[i] = self._chunk(int(wanted[i]), left)
                left -= int(grants[i])
        busy = grants > 0
        return (order, grants) if busy.all() else (order[busy], grants[busy])

    def _chunk(self, wanted: int, left: int) -> int:
        """How much of a prompt to compute now, with ``left`` tokens of the budget."""
        whole = wanted <= left or self.config.enable_chunked_prefill
        return min(wanted, left) if whole else 0

    def _admit(self, plan: _Plan) -> None:
        """Give rows to waiting sequences while budget, rows and blocks last."""
        left = self.config.max_num_batched_tokens - int(plan.grants.sum())
        while left > 0 and self.table.num_vacant and (sequence := self.waiting.peek()):
            prefix = self.blocks.find_prefix(sequence)
            grant = self._chunk(len(sequence.token_ids) - prefix.num_computed, left)
            if prefix.num_needed > self.pool.num_free:
                if len(plan.rows) or self.num_running or not self._drop_shares_but(sequence):
                    return
                continue
            if not grant:
                return
            self.waiting.pop()
            self._join(plan, sequence, grant)
            left -= grant

    def _join(self, plan: _Plan, sequence: Sequence, grant: int) -> None:
        """Put a sequence that has left the queue into the step."""
        prefix = self.blocks.find_prefix(sequence)
        self.blocks.hold(sequence, prefix)
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = prefix.num_computed
            self.stats.prefix_cache_queries += sequence.num_prompt_tokens
            self.stats.prefix_cache_hits += prefix.num_computed
        joined = self.table.join(sequence, prefix.num_computed)
        row, grants = np.array([joined.row], np.int32), np.array([grant], np.int32)
        plan.joined.append(joined)
        plan.copies += self.blocks.extend(row, grants)
        plan.rows = np.concatenate([plan.rows, row])
        plan.grants = np.concatenate([plan.grants, grants])

    def _drop_shares_but(self, keep: Sequence) -> bool:
        """Waiting forks may hold all blocks between them: let them go, they can be recomputed."""
        holders = [s for s in self.waiting if s.blocks and s is not keep]
        for sequence in holders:
            self.blocks.drop(sequence)
        return bool(holders)

    def _start(self, plan: _Plan) -> Batch:
        table = self.table
        self.stats.num_steps += 1
        targets = {target for _, target in plan.copies}
        plan.copies += [(0, block) for block in self._to_clean if block not in targets]
        self._to_clean = []
        batch = assemble_batch(
            table,
            self.stats.num_steps,
            plan.rows,
            plan.grants,
            tuple(plan.joined),
            plan.copies,
            self.grammars,
        )
        self._under_way[batch.step] = table.epoch[plan.rows]
        self._last_was_prefill = bool((plan.grants > 1).any())
        table.num_computed[plan.rows] += plan.grants
        table.num_tokens[plan.rows[batch.sampled]] += 1
        return batch

    def _victim(self) -> Sequence:
        """The running sequence that goes back to the queue: the last in the policy's order."""
        candidates = [self.table.at(int(row)) for row in self.table.order]
        if not candidates:
            raise InvariantError("pool", "blocks are missing but no sequence runs")
        if self.config.policy == "priority":
            return max(candidates, key=lambda s: (s.request.priority, s.request.arrival_time))
        return candidates[-1]

    def _preempt(self, sequence: Sequence) -> None:
        """Take row and blocks back; the sequence will be computed again from its tokens."""
        self.stats.num_preemptions += 1
        self.blocks.register_all(sequence)
        self.table.leave(sequence)
        self.blocks.drop(sequence)
        self.waiting.push_front(sequence)

    def _end(self, sequence: Sequence, *, is_bad: bool = False) -> None:
        """Forget a sequence; those that waited to share its prefill wait on their own.

        ``is_bad``: its KV must not be found by others.
        """
        parent = self.sequences.get(sequence.request.parent or 0)
        if sequence.row is not None:
            if not is_bad:
                self.blocks.register_all(sequence)
            self.table.leave(sequence)
        elif parent is not None and sequence in parent.children:
            parent.children.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.drop(sequence)
        del self.sequences[sequence.request.id]
        for child in sequence.children:
            self.waiting.push(child)
        if sequence.request.grammar:
            self.grammars.forget(sequence.request.id)
        if sequence in self._suspects:
            self._suspects.remove(sequence)

    def update(self, batch: Batch, output: StepOutput) -> list[Update]:
        """Take in a step: tokens, ends, blocks that became full. Returns what to tell the users.

        Results of sequences that ended meanwhile are dropped.
        """
        live = self._under_way.pop(batch.step) == self.table.epoch[batch.rows]
        self.blocks.register_prompts(batch, live)
        updates, notable = sequence_updates(self.table, batch, output, live)
        if self.table.num_grammars:
            advance_grammars(self.table, self.grammars, batch, live, updates, notable)
        for update, sequence in notable:
            if not sequence.has_started:
                self._first_token(sequence)
            if update.error is not None:
                self._clean(sequence)
            if update.finish_reason is not None:
                self._end(sequence, is_bad=update.error is not None)
        if self._suspects:
            ids = {update.id for update in updates}
            self._suspects = [s for s in self._suspects if s.request.id not in ids]
        self.stats.num_generation_tokens += len(batch.sampled)
        return updates

    def _clean(self, sequence: Sequence) -> None:
        """Its KV may hold NaN, which masked reads of later owners would spread."""
        self.pool.unregister(sequence.blocks)
        self._to_clean += [b for b in sequence.blocks if self.pool.references(b) == 1]

    def _first_token(self, sequence: Sequence) -> None:
        """The prompt is computed: sequences that wait for it take their share and queue up."""
        sequence.has_started = True
        self.stats.num_prompt_tokens += sequence.num_prompt_tokens
        for child in reversed(sequence.children):
            self.blocks.fork(sequence, child)
            self.waiting.push_front(child)
        sequence.children = []

    def step_failed(self, batch: Batch, reason: str) -> list[Update]:
        """A step raised. Its sequences are computed again one at a time; who fails alone, ends.

        All running sequences lose their KV, for a failed step may have left anything there.
        Steps under way behind it must be dropped by the caller.
        """
        suspects = [s for row in batch.rows if (s := self.table.sequences[int(row)]) is not None]
        self._under_way.clear()
        for row in self.table.order[::-1].tolist():
            self._preempt(self.table.at(row))
        self.pool.forget_cached()
        if batch.num_rows > 1:
            self._suspects += [s for s in suspects if s not in self._suspects]
            return []
        for sequence in suspects:
            self._end(sequence)
        return [
            Update(id=s.request.id, token_ids=[], finish_reason="error", error=reason)
            for s in suspects
        ]

    def _schedule_alone(self, sequence: Sequence) -> Batch | None:
        """A step with nothing but one suspect; others keep their rows if there is room."""
        if self._under_way:
            return None
        budget = self.config.max_num_batched_tokens
        if sequence.row is not None:
            rows = np.array([sequence.row], np.int32)
            left = self.table.num_tokens[rows] - self.table.num_computed[rows]
            plan = _Plan(rows=rows, grants=np.minimum(left, budget).astype(np.int32))
            plan.copies = self.blocks.extend(rows, plan.grants)
            return self._start(plan)
        while not self.table.num_vacant or (
            self.blocks.find_prefix(sequence).num_needed > self.pool.num_free
        ):
            self._preempt(self._victim())
        self.waiting.remove(sequence)
        plan = _Plan(rows=_NO_ROWS, grants=_NO_ROWS)
        prefix = self.blocks.find_prefix(sequence)
        self._join(plan, sequence, min(len(sequence.token_ids) - prefix.num_computed, budget))
        return self._start(plan)

    def held_blocks(self) -> Iterator[list[int]]:
        """Block lists of all sequences, for ``BlockPool.check``."""
        return (sequence.blocks for sequence in self.sequences.values())
