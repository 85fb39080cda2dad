import numpy as np
import pytest

from dovetail.core.batch import Batch, SamplingBatch
from dovetail.core.bench.steps import MeteredRunner, StepTime, StepTimes


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class SlowRunner:
    """Each step takes a second to start and two to wait for."""

    def __init__(self, clock):
        self.clock = clock
        self.closed = False

    def step(self, batch):
        self.clock.now += 1
        return self

    def result(self):
        self.clock.now += 2
        return "tokens"

    def plan(self):
        return "plan"

    def close(self):
        self.closed = True


def batch(num_rows, tokens_each=1):
    rows = np.arange(num_rows)
    lens = np.full(num_rows, tokens_each, np.int32)
    empty = np.zeros(0, np.intp)
    return Batch(
        step=0,
        rows=rows,
        query_lens=lens,
        context_lens=lens,
        block_tables=np.zeros((num_rows, 1), np.int32),
        token_ids=np.zeros(num_rows * tokens_each, np.int32),
        carried=empty,
        carried_rows=empty,
        sampled=rows,
        copies=np.zeros((0, 2), np.int32),
        joined=(),
        sampling=SamplingBatch.greedy(num_rows),
    )


@pytest.fixture
def clock():
    return Clock()


def test_what_is_outside_the_runner_is_the_host_s(clock):
    meter = MeteredRunner(SlowRunner(clock), clock)
    for _ in range(2):
        clock.now += 5
        pending = meter.step(batch(3))
        clock.now += 4
        assert pending.result() == "tokens"
    first, second = meter.times.steps
    assert first == StepTime(7.0, 1.0, 2.0, 3, 3), "it begins when it is started"
    assert second == StepTime(12.0, 1.0, 2.0, 3, 3)
    assert (first.host, second.host) == (4.0, 9.0)


def test_steps_ahead_count_where_they_are_started(clock):
    meter = MeteredRunner(SlowRunner(clock), clock)
    first = meter.step(batch(2))
    clock.now += 3
    second = meter.step(batch(2))
    first.result()
    second.result()
    assert [step.starting for step in meter.times.steps] == [2.0, 0.0]
    assert [step.host for step in meter.times.steps] == [3.0, 0.0]


def test_a_pause_between_two_measurements_is_forgotten(clock):
    meter = MeteredRunner(SlowRunner(clock), clock)
    meter.step(batch(1)).result()
    clock.now += 1000
    meter.clear()
    assert meter.times.summary() == {}
    meter.step(batch(1)).result()
    assert meter.times.steps == (StepTime(3.0, 1.0, 2.0, 1, 1),)


def test_summary():
    steps = tuple(StepTime(10e-3, 4e-3, 5e-3, 1, 1) for _ in range(99))
    summary = StepTimes(steps=(*steps, StepTime(20e-3, 4e-3, 5e-3, 1, 1))).summary()
    assert summary["num_steps"] == 100
    assert summary["host_us_mean"] == pytest.approx(1100)
    assert 1000 < summary["host_us_p99"] < 11_000
    shares = [summary[f"{part}_share"] for part in ("host", "starting", "waiting")]
    assert shares == pytest.approx([0.11 / 1.01, 0.4 / 1.01, 0.5 / 1.01])


def test_decodes_are_steps_of_one_token_for_each_row_after_another(clock):
    meter = MeteredRunner(SlowRunner(clock), clock)
    for num_rows, tokens_each in ((2, 9), (2, 1), (2, 1), (1, 2), (2, 1), (2, 1), (1, 1)):
        clock.now += num_rows * 10 + tokens_each
        meter.step(batch(num_rows, tokens_each)).result()
    assert meter.times.decodes(2) == [24.0, 24.0]
    assert meter.times.decodes(1) == []


def test_everything_else_is_the_runner_s(clock):
    runner = SlowRunner(clock)
    meter = MeteredRunner(runner, clock)
    assert meter.plan() == "plan"
    meter.close()
    assert runner.closed


def test_who_is_told_of_steps_takes_no_time_that_counts(clock):
    meter, told = MeteredRunner(SlowRunner(clock), clock), []

    def on_step(batch):
        clock.now += 50
        told.append(batch.num_rows)

    meter.on_step = on_step
    for count in (2, 3):
        clock.now += 5
        meter.step(batch(count)).result()
    assert told == [2, 3]
    first, second = meter.times.steps
    assert (first.total, first.host) == (3, 0)
    assert (second.total, second.starting, second.waiting, second.host) == (8, 1, 2, 5)
