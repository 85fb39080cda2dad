"""Continuous batching: decides each step, and takes in what it produced."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.errors import InvariantError
from dovetail.core.kv.pool import BlockPool
from dovetail.core.request import Request
from dovetail.core.scheduler.admission import Admission
from dovetail.core.scheduler.assemble import assemble_batch
from dovetail.core.scheduler.beams import BeamSearches
from dovetail.core.scheduler.blocks import SequenceBlocks
from dovetail.core.scheduler.isolation import Suspects
from dovetail.core.scheduler.masking import advance_grammars
from dovetail.core.scheduler.plan import Plan, longest_first
from dovetail.core.scheduler.policy import WaitingQueue, rank_of, victim
from dovetail.core.scheduler.prepared import PreparedQueue
from dovetail.core.scheduler.results import sequence_updates
from dovetail.core.scheduler.rows import RowTable
from dovetail.core.scheduler.running import RunningRows
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.scheduler.settings import SchedulerConfig, SchedulerStats
from dovetail.core.speculative.speculation import Speculation
from dovetail.core.structured.base import Grammars, NoGrammars
from dovetail.core.update import Update

__all__ = ["Scheduler", "SchedulerConfig", "SchedulerStats"]


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
        self.blocks = SequenceBlocks(self.pool, self.table, config)
        self.rank = rank_of(config)
        self.waiting = PreparedQueue(WaitingQueue(self.rank), self.grammars)
        self.sequences: dict[int, Sequence] = {}
        self.stats = SchedulerStats()
        self.admission = Admission(config, self.waiting, self.blocks, self.stats)
        self._under_way: dict[int, npt.NDArray[np.int64]] = {}
        """Epochs of the rows of each step that was scheduled and has not come in."""
        self._suspects = Suspects()
        self._to_clean: list[int] = []
        """Blocks that may hold NaN: overwritten with block 0 before anybody gets them."""
        self._last_was_prefill = False
        self.speculation = (
            Speculation(config.speculation, self.table, self.grammars)
            if config.speculation
            else None
        )
        self.running = RunningRows(config, self.table, self.blocks, self.speculation)
        self.beams = BeamSearches(
            self.table, self.blocks, self.waiting, self.sequences, self.stats, end=self._end
        )

    def add(self, request: Request) -> None:
        """Take up a request.

        Raises:
            InvariantError: Its id is here already.
            RequestFailedError: It can never fit; it was validated against a larger pool.
        """
        if request.id in self.sequences or self.beams.has(request.id):
            raise InvariantError("request", f"I12: request {request.id} is here already")
        self.admission.check_fit(request)
        self.stats.num_accepted += 1
        if request.params.use_beam_search:
            self.beams.add(request)
            return
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
                self.stats.num_aborted += 1
            else:
                self.stats.num_aborted += self.beams.abort(request_id)

    def has_work(self) -> bool:
        """Whether any request is here."""
        return bool(self.sequences)

    @property
    def num_suspects(self) -> int:
        """Requests that run alone next, after a step that failed."""
        return len(self._suspects)

    @property
    def num_under_way(self) -> int:
        """Steps that were started and have not come in."""
        return len(self._under_way)

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
        self.blocks.release_behind()
        if self._suspects:
            return self._schedule_alone(self._suspects.first())
        batch = self._schedule_together()
        while batch is None and self._put_out_resting():
            batch = self._schedule_together()
        if batch is None and not self._under_way:
            self.waiting.rest()
        return batch

    def _schedule_together(self) -> Batch | None:
        for decode, prefill in self._turns():
            plan = self._plan_running(decode, prefill)
            if plan is None:
                return None
            if prefill:
                self.running.top_up(plan, self.admission.admit(plan))
            if len(plan.rows):
                return self._start(plan)
        return None

    def _put_out_resting(self) -> bool:
        """Nothing can run: a beam that rests in a row may be in the way of one it waits for."""
        resting = None if self._under_way else self.beams.resting_in_row()
        if resting is not None:
            self._preempt(resting)
        return resting is not None

    def _turns(self) -> tuple[tuple[bool, bool], ...]:
        """Which of (decode, prefill) may share the step, in the order in which to try."""
        if self.config.mixed_batches:
            return ((True, True),)
        turns = ((False, True), (True, False))
        return turns[::-1] if self._last_was_prefill else turns

    def _plan_running(self, decode: bool, prefill: bool) -> Plan | None:
        """The part of the step that rows have a claim to; None if steps under way come first.

        Where blocks run out, sequences go back to the queue, but only once nothing is under way:
        then all their tokens are known.
        """
        plan = self.running.grant(decode, prefill, ahead=bool(self._under_way))
        while (need := self.blocks.need(plan.rows, plan.reach)).total > self.pool.num_free:
            if plan.drafts is not None or plan.ahead is not None:
                plan = self.running.grant(
                    decode, prefill, ahead=bool(self._under_way), may_draft=False
                )
                continue
            if self._under_way:
                return None
            self._make_room()
            plan = self.running.grant(decode, prefill, ahead=bool(self._under_way), may_draft=False)
        if need.total:
            plan.copies = self.blocks.give(need)
        return plan

    def _start(self, plan: Plan) -> Batch:
        table = self.table
        self.stats.num_steps += 1
        targets = {target for _, target in plan.copies}
        plan.copies += [(0, block) for block in self._to_clean if block not in targets]
        self._to_clean = []
        if plan.only_decodes:
            plan.rows = plan.rows[longest_first(table.num_computed[plan.rows])]
        drafts = plan.padded(plan.drafts)
        batch = assemble_batch(
            table,
            self.stats.num_steps,
            plan.rows,
            plan.grants,
            tuple(plan.joined),
            plan.copies,
            self.grammars,
            drafts=drafts,
            ahead=plan.padded(plan.ahead),
        )
        if batch.num_tokens > self.config.max_num_batched_tokens:
            raise InvariantError("engine", f"I10: a step has {batch.num_tokens} tokens")
        self._under_way[batch.step] = table.epoch[plan.rows]
        fills = plan.grants > 1 if drafts is None else plan.grants > 1 + drafts
        self._last_was_prefill = bool(fills.any())
        if self.speculation is not None:
            self.speculation.started(batch, only_decode=not self._last_was_prefill)
        table.num_computed[plan.rows] += plan.grants
        table.num_tokens[plan.rows[batch.sampled]] += 1
        return batch

    def _make_room(self) -> None:
        """Free some blocks: those of a victim, or those of forks if only pinned ones run."""
        chosen = self._victim() if self.num_running else None
        only_pinned = chosen is None or self.admission.is_pinned(chosen)
        if only_pinned and self.blocks.drop_shares(self.waiting):
            return
        if chosen is None:
            raise InvariantError("pool", "blocks are missing but nobody has any to give")
        chosen.num_preemptions += 1
        self._preempt(chosen)

    def _victim(self) -> Sequence:
        limit = self.config.max_preemptions
        return victim(self.table.order.tolist(), self.table, self.rank, limit)

    def _preempt(self, sequence: Sequence) -> None:
        """Take row and blocks back; the sequence will be computed again from its tokens."""
        self.stats.num_preemptions += 1
        self.blocks.register_all(sequence)
        self.table.leave(sequence)
        self.blocks.drop(sequence)
        if not sequence.rests:
            self.waiting.push(sequence)

    def _end(self, sequence: Sequence, *, is_bad: bool = False) -> None:
        """Forget a sequence; those that waited to share its prefill wait on their own.

        ``is_bad``: its KV must not be found by others.
        """
        if is_bad:
            self._clean(sequence)
        parent = self.sequences.get(sequence.request.parent or 0)
        if sequence.row is not None:
            if not is_bad:
                self.blocks.register_all(sequence)
            self.table.leave(sequence)
        elif parent is not None and sequence in parent.children:
            parent.children.remove(sequence)
        elif not sequence.rests:
            self.waiting.remove(sequence)
        self.blocks.drop(sequence)
        del self.sequences[sequence.request.id]
        for child in sequence.children:
            self.waiting.push(child)
        if sequence.request.grammar:
            self.grammars.forget(sequence.request.id)
        self._suspects.forget(sequence)

    def update(self, batch: Batch, output: StepOutput, seconds: float = 0.0) -> list[Update]:
        """Take in a step: tokens, ends, blocks that became full. Returns what to tell the users.

        Results of sequences that ended meanwhile are dropped. ``seconds`` is what the step took,
        its share where steps overlap.
        """
        epochs = self._under_way.pop(batch.step, None)
        if epochs is None or len(output.token_ids) != len(batch.sampled):
            what = f"the runner gave {len(output.token_ids)} results for {len(batch.sampled)} rows"
            raise InvariantError("engine", f"I14: step {batch.step} is not under way, or {what}")
        live = epochs == self.table.epoch[batch.rows]
        if self.speculation is not None:
            self.speculation.finished(batch, output, live, seconds)
        self.blocks.register_prompts(batch, live)
        updates, notable = sequence_updates(self.table, batch, output, live)
        if self.table.num_grammars:
            advance_grammars(self.table, self.grammars, batch, live, updates, notable)
        for update, sequence in notable:
            if not sequence.has_started and update.error is None:
                self._first_token(sequence)
            self._settle(sequence, update, updates)
        if self._suspects:
            self._suspects.acquit(updates)
        self.stats.num_generation_tokens += int(output.num_tokens.sum())
        return self.beams.public(updates)

    def _settle(self, sequence: Sequence, update: Update, updates: list[Update]) -> None:
        """Act on what an update says of a sequence; a beam's search may add to the updates."""
        if sequence.beam is not None:
            self.beams.take(sequence, update, updates)
        elif update.finish_reason is not None:
            self._end(sequence, is_bad=update.error is not None)
            self.stats.num_finished += update.error is None
            self.stats.num_failed += update.error is not None

    def _clean(self, sequence: Sequence) -> None:
        """Its KV may hold NaN, which an attention backend that is not certified might spread."""
        self.pool.unregister(sequence.blocks)
        self._to_clean += [b for b in sequence.blocks if self.pool.references(b) == 1]

    def _first_token(self, sequence: Sequence) -> None:
        """The prompt is computed: sequences that wait for it take their share and queue up."""
        sequence.has_started = True
        self.stats.num_prompt_tokens += sequence.num_prompt_tokens
        for child in sequence.children:
            self.blocks.fork(sequence, child, sequence.num_prompt_tokens - 1)
            self.waiting.push(child)
        sequence.children = []

    def step_failed(self, batch: Batch, reason: str) -> list[Update]:
        """A step raised. Its sequences are computed again one at a time; who fails alone, ends.

        All running sequences lose their KV, for a failed step may have left anything there.
        Steps under way behind it must be dropped by the caller.
        """
        live = self._under_way[batch.step] == self.table.epoch[batch.rows]
        suspects = [self.table.at(row) for row in batch.rows[live].tolist()]
        self._under_way.clear()
        if self.speculation is not None:
            self.speculation.dropped()
        for row in self.table.order[::-1].tolist():
            self._preempt(self.table.at(row))
        for sequence in self.waiting:
            self.blocks.drop(sequence)
        self.pool.forget_cached()
        if batch.num_rows > 1:
            self._suspects.add(suspects)
            return []
        updates = [
            Update(id=s.request.id, token_ids=[], finish_reason="error", error=reason)
            for s in suspects
        ]
        for sequence, update in zip(suspects, list(updates), strict=True):
            self._settle(sequence, update, updates)
        return self.beams.public(updates)

    def _schedule_alone(self, sequence: Sequence) -> Batch | None:
        """A step with nothing but one suspect; others keep their rows if there is room."""
        if self._under_way:
            return None
        budget = self.config.max_num_batched_tokens
        if sequence.row is not None:
            rows = np.array([sequence.row], np.intp)
            left = self.table.num_tokens[rows] - self.table.num_computed[rows]
            plan = Plan(rows=rows, grants=np.minimum(left, budget).astype(np.int32))
            plan.copies = self.blocks.extend(rows, plan.grants)
            return self._start(plan)
        while not self.table.num_vacant or (
            self.blocks.find_prefix(sequence).num_needed > self.pool.num_free
        ):
            self._make_room()
        plan = Plan()
        prefix = self.blocks.find_prefix(sequence)
        self.admission.join(
            plan, sequence, min(len(sequence.token_ids) - prefix.num_computed, budget)
        )
        return self._start(plan)

    def held_blocks(self) -> Iterator[list[int]]:
        """Block lists of all sequences, for ``BlockPool.check``."""
        return (sequence.held for sequence in self.sequences.values())
