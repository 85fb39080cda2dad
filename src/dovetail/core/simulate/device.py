"""The runner of the simulation: the oracle, the faults that are due, and a look at every batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.contracts.runner import Pending, Runner
from dovetail.core.errors import InjectedError, InvariantError
from dovetail.core.scheduler.scheduler import Scheduler
from dovetail.core.scheduler.sequence import Sequence

__all__ = ["Device"]


class Device:
    """Stands between the engine and the oracle.

    Args:
        runner: The oracle's.
        scheduler: Looked at when a step begins.
        blame: Told the id of each request that a fault is meant for.
        log: Told of each batch, in one line.
    """

    def __init__(
        self,
        runner: Runner,
        scheduler: Scheduler,
        blame: Callable[[int], None],
        log: Callable[[str], None],
    ) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._blame = blame
        self._log = log
        self._salts: dict[int, str] = {}
        """Whose tokens a block holds: the salt of its last writer."""
        self._have_run: set[int] = set()
        self.due: list[tuple[str, int]] = []
        """Faults for the next steps, each with a number that picks a row."""

    def step(self, batch: Batch) -> Pending:
        """Check the batch, run it, and do what is due."""
        sequences = [self._scheduler.table.at(row) for row in batch.rows.tolist()]
        ids = [sequence.request.id for sequence in sequences]
        self._log(
            f"batch {batch.step}: {ids} compute {batch.query_lens.tolist()}"
            f" after {batch.context_lens.tolist()}"
        )
        self._check_order(batch)
        self._check_blocks(batch, sequences)
        if self._take("raise_at_start") is not None:
            self._blame_if_alone(ids)
            raise InjectedError("at the start of a step")
        return _Step(self, self._runner.step(batch), batch, ids)

    def close(self) -> None:
        """Give the oracle's memory back."""
        self._runner.close()

    def finish(self, output: StepOutput, batch: Batch, ids: list[int]) -> StepOutput:
        """The output of a step as the engine gets it. Raises InjectedError if that is due."""
        if self._take("raise_in_result") is not None:
            self._blame_if_alone(ids)
            raise InjectedError("in the result of a step")
        sampled = batch.sampled.tolist()
        if sampled and (pick := self._take("not_finite")) is not None:
            place = pick % len(sampled)
            self._blame(ids[sampled[place]])
            finite = output.finite.copy()
            finite[place] = False
            output = dataclasses.replace(output, finite=finite)
        if sampled and (pick := self._take("row_fails")) is not None:
            place = pick % len(sampled)
            self._blame(ids[sampled[place]])
            failures = {**output.failures, place: "a fault of the simulation"}
            output = dataclasses.replace(output, failures=failures)
        return output

    def _take(self, kind: str) -> int | None:
        """The number that comes with a fault of this kind, if one is due."""
        for index, (name, number) in enumerate(self.due):
            if name == kind:
                del self.due[index]
                return number
        return None

    def _blame_if_alone(self, ids: list[int]) -> None:
        if len(ids) == 1:
            self._blame(ids[0])

    def _check_order(self, batch: Batch) -> None:
        """No new request passes one ahead of it that was preempted, or passed often enough."""
        joined = [self._scheduler.table.at(j.row).request for j in batch.joined]
        limit, rank = self._scheduler.config.max_bypasses, self._scheduler.rank
        waiting = [
            s for s in self._scheduler.waiting if s.num_preemptions or s.num_bypasses > limit
        ]
        ahead = min((rank(s.request) for s in waiting), default=None)
        for request in joined:
            first = request.id not in self._have_run and request.parent is None
            if first and ahead is not None and ahead < rank(request):
                raise InvariantError(
                    "engine", f"I15: {request.id} gets a row while one ahead of it must not wait"
                )
        self._have_run.update(request.id for request in joined)

    def _check_blocks(self, batch: Batch, sequences: list[Sequence]) -> None:
        """Nobody reads what another salt wrote, and nobody writes what others hold."""
        size, pool = self._scheduler.config.block_size, self._scheduler.pool
        for source, target in batch.copies.tolist():
            self._salts[target] = self._salts.get(source, "")
        contexts, ends = batch.context_lens.tolist(), batch.sequence_lens.tolist()
        for sequence, context, end in zip(sequences, contexts, ends, strict=True):
            salt, number = sequence.request.cache_salt, sequence.request.id
            for block in sequence.blocks[: -(-context // size)]:
                if block and self._salts.get(block, salt) != salt:
                    raise InvariantError(
                        "pool", f"I6: {number} reads block {block} of another salt"
                    )
            if any(block == 0 for block in sequence.blocks[self._first_seen(context) :]):
                raise InvariantError("pool", f"I8: {number} misses a block that it looks at")
            for block in sequence.blocks[context // size : -(-end // size)]:
                self._salts[block] = salt
                if pool.references(block) != 1 or pool.name_of(block) is not None:
                    what = f"block {block}, which is shared or in the prefix index"
                    raise InvariantError("pool", f"I5: request {number} writes {what}")

    def _first_seen(self, context: int) -> int:
        """Index of the first block that the token after ``context`` others looks at."""
        window, size = self._scheduler.config.window, self._scheduler.config.block_size
        return 0 if window is None else max(context - window + 1, 0) // size


class _Step:
    def __init__(self, device: Device, pending: Pending, batch: Batch, ids: list[int]) -> None:
        self._device = device
        self._pending = pending
        self._batch = batch
        self._ids = ids

    def result(self) -> StepOutput:
        return self._device.finish(self._pending.result(), self._batch, self._ids)
