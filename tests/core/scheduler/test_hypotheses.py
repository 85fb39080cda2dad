"""The rules of a beam search alone: when it ends early, the answer is what it would have been."""

from __future__ import annotations

import numpy as np
import pytest

from dovetail.core.scheduler.hypotheses import Beam, BeamGroup
from dovetail.core.scheduler.sequence import Sequence
from dovetail.core.update import TokenAlternatives
from tests.core.scheduler.beam_cases import (
    Outcome,
    beam_request,
    plain,
    reference,
    scores,
)

HEAT = 0.8


def flat(prefix: list[int]) -> np.ndarray:
    """Scores that are closer together: later texts catch up with earlier ones."""
    x = scores(prefix).astype(np.float64) * HEAT
    return (x - np.log(np.exp(x).sum())).astype(np.float32)


def run(group: BeamGroup, prompt: list[int]) -> tuple[Outcome, int]:
    """Drive a group without an engine; its outcome, and in how many rounds."""
    sequence = Sequence(group.request)
    group.live = [Beam(group, sequence)]
    rounds = 0
    while True:
        for beam in group.live:
            tokens = [] if beam.path is None else [s.token_id for s in beam.path.walk()][::-1]
            row = flat(prompt + tokens)
            order = np.argsort(-row, kind="stable")[: 2 * group.width].tolist()
            ids = [order[0], *order]
            beam.candidates = TokenAlternatives(ids, [float(row[t]) for t in ids], 1)
        rounds += 1
        going = group.advance()
        if not going:
            return plain(group.outcome()), rounds
        group.live = [Beam(group, sequence, s.path(), s.cumulative_logprob) for s in going]


@pytest.mark.parametrize("penalty", [-2.0, -0.5, 0.0, 0.5, 1.0, 2.0])
def test_an_early_end_changes_nothing(penalty: float) -> None:
    early = 0
    for seed in range(25):
        prompt = [seed] * 12
        request = beam_request(1, prompt, 3, 30, length_penalty=penalty)
        outcome, rounds = run(BeamGroup(request), prompt)
        assert outcome == reference(prompt, 3, 30, flat, length_penalty=penalty)
        early += rounds < 30
    assert early > 0 or penalty >= 2.0


def test_candidates_without_any_chance_are_no_candidates() -> None:
    request = beam_request(1, [1], 2, 5)
    group = BeamGroup(request)
    beam = Beam(group, Sequence(request))
    group.live = [beam]
    nothing = float("-inf")
    beam.candidates = TokenAlternatives([3, 3, 7, 9, 4], [-0.1, -0.1, -2.4, nothing, nothing], 1)
    (step,) = group.advance()
    assert (step.token_id, step.cumulative_logprob) == (3, -0.1)
    assert plain(group.outcome()) == [([], -2.4, "stop")]
