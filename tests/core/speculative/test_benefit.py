"""Guessing is switched off, and on again, by what was measured."""

import random

from dovetail.core.speculative.benefit import Benefit


def run(benefit, num_rows, steps, rate_with, rate_without, seed=0):
    """How many of the steps had drafts, when each kind gives so many tokens per second."""
    rng, drafted = random.Random(seed), 0
    for _ in range(steps):
        kind = benefit.worthwhile(num_rows)
        drafted += kind
        rate = (rate_with if kind else rate_without) * rng.uniform(0.8, 1.2)
        benefit.measured(num_rows, kind, num_rows, num_rows / rate)
    return drafted / steps


def test_the_better_kind_is_used_and_the_other_looked_at_now_and_then():
    assert 0.9 < run(Benefit(), 4, 2000, 200.0, 100.0) < 1.0
    assert 0.0 < run(Benefit(), 4, 2000, 100.0, 200.0) < 0.1


def test_batches_of_different_size_are_judged_apart():
    benefit = Benefit()
    assert run(benefit, 1, 500, 200.0, 100.0) > 0.9
    assert run(benefit, 64, 500, 100.0, 200.0) < 0.15
    assert run(benefit, 1, 100, 200.0, 100.0) > 0.9


def test_a_change_of_fortune_is_noticed():
    benefit = Benefit()
    run(benefit, 8, 600, 100.0, 200.0)
    run(benefit, 8, 600, 200.0, 100.0)
    assert run(benefit, 8, 400, 200.0, 100.0) > 0.9
    run(benefit, 8, 600, 100.0, 200.0)
    assert run(benefit, 8, 400, 100.0, 200.0) < 0.1


def test_a_slow_first_step_is_forgotten():
    benefit = Benefit()
    benefit.measured(2, True, 2, 60.0)
    assert run(benefit, 2, 1000, 200.0, 100.0) > 0.8
