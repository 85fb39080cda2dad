"""What a beam search keeps and what it drops. Pure: knows no rows and no blocks.

The rules are those of vLLM's ``beam_search``. In each round every live beam offers its
``2 * width`` likeliest tokens. A token that ends the text makes a finished hypothesis, whatever its
rank; of the others the ``width`` with the highest cumulative log-probability live on. The answer is
the ``width`` best of all that is finished, what is cut off at ``max_tokens`` among them, by

    cumulative log-probability / (tokens of prompt and continuation) ** length_penalty

where a token that ended the text counts for the probability and not for the length.

The search ends early only when that cannot change the answer: probabilities are at most 1, so the
score that a live beam can still reach has a bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dovetail.core.request import Request
from dovetail.core.update import Hypothesis, TokenAlternatives

if TYPE_CHECKING:
    from dovetail.core.scheduler.sequence import Sequence

__all__ = ["Beam", "BeamGroup", "Continuation"]


@dataclass(frozen=True, eq=False, slots=True)
class _Path:
    """The tokens of a beam, last first; beams that were one once share the rest."""

    before: _Path | None
    token_id: int
    alternatives: TokenAlternatives

    def walk(self) -> Iterator[_Path]:
        """From the last token to the first."""
        step: _Path | None = self
        while step is not None:
            yield step
            step = step.before


@dataclass(eq=False, slots=True)
class Beam:
    """A live beam. A new one is made for every token."""

    group: BeamGroup
    sequence: Sequence
    path: _Path | None = None
    cumulative_logprob: float = 0.0
    candidates: TokenAlternatives | None = None
    """The likeliest next tokens behind the one that was sampled; None until its step is done."""


class Continuation(NamedTuple):
    """A token that a live beam may go on with."""

    beam: Beam
    candidates: TokenAlternatives
    """The beam's, of which the token is one."""
    token_id: int
    logprob: float
    rank: int
    cumulative_logprob: float

    def path(self) -> _Path:
        """The beam's, with the token and as many alternatives as the request wants to see."""
        shown = 1 + (self.beam.group.request.params.logprobs or 0)
        alternatives = TokenAlternatives(
            token_ids=[self.token_id, *self.candidates.token_ids[1:shown]],
            logprobs=[self.logprob, *self.candidates.logprobs[1:shown]],
            rank=self.rank,
        )
        return _Path(self.beam.path, self.token_id, alternatives)


class BeamGroup:
    """All beams of one request.

    Args:
        request: With ``use_beam_search``; ``stop_token_ids`` are the tokens that end a text.
    """

    def __init__(self, request: Request) -> None:
        params = request.params
        self.request = request
        self.width = params.best_of or params.n
        self.live: list[Beam] = []
        self._max_tokens = params.max_tokens or 0
        self._num_generated = 0
        self._finished: list[tuple[float, Hypothesis]] = []
        """The best so far, best first: as many as the search is wide, with their scores."""

    @property
    def is_ready(self) -> bool:
        """Whether every live beam has its candidates."""
        return all(beam.candidates is not None for beam in self.live)

    def advance(self) -> list[Continuation]:
        """Choose how the search goes on, best first; empty: it has ended."""
        offered = [step for beam in self.live for step in self._offers(beam)]
        ends = frozenset(self.request.stop_token_ids)
        for step in offered:
            if step.token_id in ends:
                self._finish(step, "stop", self._num_generated)
        going = [step for step in offered if step.token_id not in ends]
        going.sort(key=lambda step: -step.cumulative_logprob)
        del going[self.width :]
        self._num_generated += 1
        if self._num_generated >= self._max_tokens:
            for step in going:
                self._finish(step, "length", self._num_generated)
            return []
        return [] if self._is_decided(going) else going

    def outcome(self) -> list[Hypothesis]:
        """What has finished, best first."""
        return [hypothesis for _, hypothesis in self._finished]

    def _offers(self, beam: Beam) -> Iterator[Continuation]:
        candidates = beam.candidates
        if candidates is None:
            return
        so_far = beam.cumulative_logprob
        pairs = zip(candidates.token_ids, candidates.logprobs, strict=True)
        for rank, (token_id, logprob) in enumerate(pairs):
            if rank and logprob > -math.inf:
                yield Continuation(beam, candidates, token_id, logprob, rank, so_far + logprob)

    def _score(self, cumulative_logprob: float, num_tokens: int) -> float:
        length = len(self.request.prompt_token_ids) + num_tokens
        return float(cumulative_logprob / length**self.request.params.length_penalty)

    def _finish(self, step: Continuation, reason: str, num_tokens: int) -> None:
        params = self.request.params
        score = self._score(step.cumulative_logprob, num_tokens)
        if len(self._finished) == self.width and score <= self._finished[-1][0]:
            return
        steps = [*step.path().walk()][::-1]
        if reason == "stop" and not params.include_stop_str_in_output:
            steps.pop()
        own = reason == "stop" and step.token_id in (params.stop_token_ids or ())
        hypothesis = Hypothesis(
            token_ids=[s.token_id for s in steps],
            cumulative_logprob=step.cumulative_logprob,
            finish_reason=reason,
            stop_reason=step.token_id if own else None,
            logprobs=None if params.logprobs is None else [s.alternatives for s in steps],
        )
        self._finished.append((score, hypothesis))
        self._finished.sort(key=lambda entry: -entry[0])
        del self._finished[self.width :]

    def _is_decided(self, going: list[Continuation]) -> bool:
        """Whether no live beam can reach the score of the worst hypothesis that would stay."""
        if len(self._finished) < self.width:
            return not going
        worst = self._finished[-1][0]
        return all(
            self._score(step.cumulative_logprob, num_tokens) <= worst
            for step in going
            for num_tokens in (self._num_generated, self._max_tokens)
        )
