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
        self.ledger = Ledger(RULE)
        self.under_way: deque[tuple[Batch, StepOutput, list[int]]] = deque()
        self.submitted = 0

    def act(self, action: str) -> bool:
        """Do it; False if it changes nothing."""
        name, _, number = action.partition(" ")
        done = bool(getattr(self, name)(*([int(number)] if number else [])))
        if done:
            check_scheduler(self.scheduler)
        return done

    def submit(self) -> bool:
        if self.submitted == len(self.groups):
            return False
        for request in self.groups[self.submitted]:
            self.ledger.submit(request)
            self.scheduler.add(request)
        self.submitted += 1
        return True

    def schedule(self) -> bool:
        if len(self.under_way) == 2 or (batch := self.scheduler.schedule()) is None:
            return False
        ids = self.scheduler.table.request_id[batch.rows].tolist()
        self.under_way.append((batch, self.runner.step(batch).result(), ids))
        return True

    def result(self) -> bool:
        if not self.under_way:
            return False
        batch, output, _ = self.under_way.popleft()
        for update in self.scheduler.update(batch, output):
            self.ledger.take(update)
        return True

    def fault(self) -> bool:
        if not self.under_way:
            return False
        batch, _, ids = self.under_way[0]
        if len(ids) == 1:
            self.ledger.blame(ids[0])
        self.under_way.clear()
        for update in self.scheduler.step_failed(batch, "an ordered fault"):
            self.ledger.take(update)
        return True

    def preempt(self) -> bool:
        if self.under_way or not self.scheduler.num_running:
            return False
        self.scheduler._preempt(self.scheduler._victim())
        return True

    def abort(self, number: int) -> bool:
        if number not in self.scheduler.sequences:
            return False
        self.ledger.abort(number)
        self.scheduler.abort([number])
        return True

    def finish(self) -> None:
        """Nothing happens any more: all come to their end, in a bounded time."""
        for _ in range(60):
            if not (self.scheduler.has_work() or self.under_way):
                break
            if not self.schedule():
                self.result()
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


@pytest.mark.parametrize(("groups", "length"), [(PAIR, 8), (FORK, 7)], ids=["pair", "fork"])
def test_every_interleaving(groups: list[list[Request]], length: int) -> None:
    ids = [request.id for group in groups for request in group]
    actions = ["submit", "schedule", "result", "fault", "preempt", *(f"abort {i}" for i in ids)]
    todo: list[tuple[str, ...]] = [()]
    num_played = 0
    while todo:
        before = todo.pop()
        for action in actions:
            after = (*before, action)
            world = played(groups, after)
            if world is None:
                continue
            num_played += 1
            if len(after) < length:
                todo.append(after)
            try:
                world.finish()
            except Exception as error:
                raise AssertionError(f"{after}: {error}") from error
    print(f"{num_played} interleavings")
    assert num_played > 1000
