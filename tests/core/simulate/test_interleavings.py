"""Every short interleaving of what can happen to two or three requests, one by one."""

from __future__ import annotations

from collections import deque

import pytest

from dovetail.core.batch import Batch, StepOutput
from dovetail.core.request import Request
from dovetail.core.scheduler.invariants import check_scheduler
from dovetail.core.scheduler.scheduler import Scheduler, SchedulerConfig
from dovetail.core.simulate.ledger import Ledger
from dovetail.platforms.oracle import OracleRunner
from tests.core.oracle import RULE, VOCAB, make_request, runner_config
from tests.thorough import thorough

CONFIG = SchedulerConfig(
    num_blocks=6,
    block_size=2,
    max_model_len=8,
    max_num_seqs=2,
    max_num_batched_tokens=3,
    vocab_size=VOCAB,
)
PAIR = [[make_request(1, [1, 2, 3], 2)], [make_request(2, [1, 2, 3, 4], 2)]]
FORK = [
    [make_request(1, [1, 2, 3], 2), make_request(2, [1, 2, 3], 2, parent=1)],
    [make_request(3, [1, 2], 2)],
]


class World:
    """A scheduler, its runner and its clients; each action is possible or not."""

    def __init__(self, groups: list[list[Request]]) -> None:
        self.groups = groups
        self.scheduler = Scheduler(CONFIG)
        self.runner = OracleRunner(runner_config(CONFIG))
        self.runner.allocate(CONFIG.num_blocks - 1)
        self.ledger = Ledger(RULE, lambda request: [])
        self.under_way: deque[tuple[Batch, StepOutput, list[int]]] = deque()
        self.submitted = 0

    def can(self, action: str) -> bool:
        """Whether it changes anything; of a step to schedule, only trying it tells for sure."""
        name, _, number = action.partition(" ")
        if name == "submit":
            return self.submitted < len(self.groups)
        if name == "schedule":
            return len(self.under_way) < 2
        if name == "preempt":
            return not self.under_way and self.scheduler.num_running > 0
        if name == "abort":
            return int(number) in self.scheduler.sequences
        return bool(self.under_way)

    def act(self, action: str) -> bool:
        """Do it; False if it changes nothing."""
        name, _, number = action.partition(" ")
        done = self.can(action) and getattr(self, name)(*([int(number)] if number else []))
        return done is not False

    def submit(self) -> None:
        for request in self.groups[self.submitted]:
            self.ledger.submit(request)
            self.scheduler.add(request)
        self.submitted += 1

    def schedule(self) -> bool:
        if (batch := self.scheduler.schedule()) is None:
            return False
        ids = self.scheduler.table.request_id[batch.rows].tolist()
        self.under_way.append((batch, self.runner.step(batch).result(), ids))
        return True

    def result(self) -> None:
        batch, output, _ = self.under_way.popleft()
        for update in self.scheduler.update(batch, output):
            self.ledger.take(update)

    def fault(self) -> None:
        batch, _, ids = self.under_way[0]
        if len(ids) == 1:
            self.ledger.blame(ids[0])
        self.under_way.clear()
        for update in self.scheduler.step_failed(batch, "an ordered fault"):
            self.ledger.take(update)

    def preempt(self) -> None:
        self.scheduler._preempt(self.scheduler._victim())

    def abort(self, number: int) -> None:
        self.ledger.abort(number)
        self.scheduler.abort([number])

    def finish(self) -> None:
        """Nothing happens any more: all come to their end, in a bounded time."""
        for _ in range(60):
            if not (self.scheduler.has_work() or self.under_way):
                break
            if not self.act("schedule"):
                self.act("result")
        assert not self.scheduler.has_work(), "no end in sight"
        self.ledger.check_over()
        check_scheduler(self.scheduler)


def played(groups: list[list[Request]], actions: tuple[str, ...]) -> World | None:
    """The world after these actions; None if the last one is not possible."""
    world = World(groups)
    for action in actions:
        if not world.act(action):
            return None
    return world


@pytest.mark.parametrize(
    ("groups", "length"), [(PAIR, 8), (FORK, 6), pytest.param(FORK, 7, marks=thorough)]
)
def test_every_interleaving(groups: list[list[Request]], length: int) -> None:
    ids = [request.id for group in groups for request in group]
    actions = ["submit", "schedule", "result", "fault", "preempt", *(f"abort {i}" for i in ids)]
    todo = [("submit",)]
    num_played = 0
    while todo:
        sequence = todo.pop()
        world = played(groups, sequence)
        if world is None:
            continue
        num_played += 1
        if len(sequence) < length:
            todo += [(*sequence, action) for action in actions if world.can(action)]
        try:
            world.finish()
        except Exception as error:
            raise AssertionError(f"{sequence}: {error}") from error
    print(f"{num_played} interleavings")
    assert num_played > 1000
