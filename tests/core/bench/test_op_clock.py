"""The watch over ops, with a clock that is set by hand."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest

from dovetail.core.bench.op_clock import OpClock, OpTime, observed
from dovetail.core.contracts.observation import SAMPLING, OpsView
from dovetail.core.errors import UnsupportedError


class Clock:
    now = 100.0

    def __call__(self):
        return self.now


class Weight:
    """A bound parameter."""


class FakeRunner:
    """Ops that take a second each; an array is a text of as many bytes as it has letters."""

    def __init__(self, clock):
        self.clock = clock
        self.down, self.norm, self.table = Weight(), Weight(), Weight()
        paths = {"layers.3.mlp.down": self.down, "layers.3.post_norm": self.norm,
                 "embed": self.table}  # fmt: skip
        self.view = OpsView(
            parameters={id(weight): path for path, weight in paths.items()},
            num_bytes=lambda value: len(value) if isinstance(value, str) else 0,
        )
        self.ops = SimpleNamespace(
            linear=self.second, rms_norm=self.second, embedding=self.second, silu=self.second,
            all_reduce=self.second, gated=self.gated, fails=self.fails,
            rotary_attention=self.nested,
        )  # fmt: skip
        self.sample = self.second

    def second(self, x, *more):
        self.clock.now += 1
        return x + "!"

    def gated(self, x, weight, activation):
        return self.ops.silu(self.ops.linear(x, weight))

    def nested(self, x):
        return self.ops.silu(self.ops.rms_norm(x, self.norm))

    def fails(self, x):
        raise ValueError(x)

    @contextmanager
    def wrap_ops(self, wrap):
        plain, sample = dict(vars(self.ops)), self.sample
        vars(self.ops).update({name: wrap(name, op) for name, op in plain.items()})
        self.sample = wrap(SAMPLING, sample)
        yield self.view
        vars(self.ops).update(plain)
        self.sample = sample


def batch():
    lens = np.array([2, 1], np.int32)
    return SimpleNamespace(query_lens=lens, sequence_lens=lens + 10, logit_index=np.arange(1))


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def runner(clock):
    return FakeRunner(clock)


@pytest.fixture
def ops(runner, clock):
    return OpClock(runner, lambda: None, clock)


def test_ops_are_told_apart_by_name_and_by_layer(runner, ops):
    ops.begin(batch(), watch=True)
    runner.ops.embedding("ab", runner.table)
    runner.ops.linear("abc", runner.down)
    runner.ops.linear("abc", runner.down)
    runner.ops.rms_norm("abc", runner.norm, 1e-6)
    runner.ops.silu("abc")
    runner.sample("abc", batch())
    (step,) = ops.steps
    assert step.times == {
        "embedding and rotary": OpTime(1, 1.0, 2 + 2 * 3),
        "down": OpTime(2, 2.0, 2 * (3 + 4)),
        "norms": OpTime(1, 1.0, 7),
        "activations": OpTime(1, 1.0, 7),
        "sampling": OpTime(1, 1.0, 7),
    }
    assert (step.query_lens.tolist(), step.context_lens.tolist()) == ([2, 1], [12, 11])
    assert (step.num_places, step.is_watched) == (1, True)


def test_an_op_that_calls_others_counts_once(runner, ops):
    ops.begin(batch(), watch=True)
    assert runner.ops.rotary_attention("a") == "a!!"
    assert runner.ops.gated("a", runner.down, "silu") == "a!!"
    (step,) = ops.steps
    assert {name: (time.calls, time.seconds) for name, time in step.times.items()} == {
        "attention": (1, 2.0), "down": (1, 2.0)
    }  # fmt: skip


def test_an_op_of_no_known_kind_has_its_own_name(runner, ops):
    ops.begin(batch(), watch=True)
    runner.ops.gated("a", None, "silu")
    assert list(ops.steps[0].times) == ["gated"]


def test_steps_that_are_not_watched_pass_untouched(runner, ops):
    plain = dict(vars(runner.ops))
    ops.begin(batch(), watch=False)
    assert vars(runner.ops) == plain
    ops.begin(batch(), watch=True)
    assert runner.ops.linear != plain["linear"]
    assert runner.ops.all_reduce == plain["all_reduce"]
    runner.ops.silu("a")
    ops.begin(batch(), watch=False)
    assert vars(runner.ops) == plain
    runner.ops.silu("a")
    assert [(step.is_watched, len(step.times)) for step in ops.steps] == [
        (False, 0), (True, 1), (False, 0)
    ]  # fmt: skip
    ops.begin(batch(), watch=True)
    ops.close()
    assert vars(runner.ops) == plain


def test_an_op_that_fails_leaves_the_clock_as_it_was(runner, ops):
    ops.begin(batch(), watch=True)
    with pytest.raises(ValueError, match="what"):
        runner.ops.fails("what")
    runner.ops.silu("a")
    assert list(ops.steps[0].times) == ["activations"]


def test_the_device_is_waited_for_before_and_after(runner, clock):
    def synchronize():
        clock.now += 10

    ops = OpClock(runner, synchronize, clock)
    ops.begin(batch(), watch=True)
    runner.ops.rotary_attention("a")
    assert clock.now == 100 + 10 + 2 + 10
    assert ops.steps[0].times["attention"].seconds == 2 + 10


def test_who_cannot_be_watched_says_so(runner):
    platform = SimpleNamespace(name="box")
    assert observed(platform, runner) is runner
    with pytest.raises(UnsupportedError, match="platform box cannot be looked into") as error:
        observed(platform, SimpleNamespace())
    assert "\n" not in str(error.value)
