"""Completions that are shown only once all are there, because the best of them are chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from dovetail.core.engine.api import CompletionDelta
from dovetail.core.engine.completion import CompletionStream
from dovetail.core.request import SamplingParams, TokenLogprobs
from dovetail.core.update import Hypothesis, Update

__all__ = ["BestOf", "beam_deltas"]


class _Candidate:
    """One completion so far."""

    __slots__ = ("last", "logprobs", "pieces", "token_ids")

    def __init__(self, first: CompletionDelta) -> None:
        self.pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] = []
        self.last = first

    def mean_logprob(self) -> float:
        """Per token; the least there is for an empty one."""
        if not self.token_ids:
            return float("-inf")
        pairs = zip(self.token_ids, self.logprobs, strict=True)
        return sum(scores[token].logprob for token, scores in pairs) / len(self.token_ids)


class BestOf:
    """Holds the completions of one request back, and gives the likeliest in the end.

    Args:
        params: As the client gave them. The engine must send log-probabilities in any case.
    """

    def __init__(self, params: SamplingParams) -> None:
        self._n = params.n
        self._shows_logprobs = params.logprobs is not None
        self._candidates: dict[int, _Candidate] = {}

    def add(self, delta: CompletionDelta) -> None:
        """Take what is new in one completion."""
        candidate = self._candidates.setdefault(delta.index, _Candidate(delta))
        candidate.pieces.append(delta.text)
        candidate.token_ids += delta.token_ids
        candidate.logprobs += delta.logprobs or ()
        candidate.last = delta

    def best(self) -> list[CompletionDelta]:
        """The ``n`` with the highest mean log-probability per token, best first, whole."""
        ranked = sorted(
            (self._candidates[index] for index in sorted(self._candidates)),
            key=_Candidate.mean_logprob,
            reverse=True,
        )
        return [
            msgspec.structs.replace(
                candidate.last,
                index=index,
                text="".join(candidate.pieces),
                token_ids=candidate.token_ids,
                logprobs=candidate.logprobs if self._shows_logprobs else None,
            )
            for index, candidate in enumerate(ranked[: self._n])
        ]


def beam_deltas(
    hypotheses: Sequence[Hypothesis], n: int, start: Callable[[int], CompletionStream]
) -> list[CompletionDelta]:
    """The ``n`` best outcomes of a beam search, as completions that come in one piece.

    Args:
        hypotheses: Best first.
        n: How many are wanted.
        start: Begins the completion of an index.
    """
    return [
        msgspec.structs.replace(
            start(index).push(
                Update(
                    id=0,
                    token_ids=found.token_ids,
                    finish_reason=found.finish_reason,
                    stop_reason=found.stop_reason,
                    logprobs=found.logprobs,
                )
            ),
            cumulative_logprob=found.cumulative_logprob,
        )
        for index, found in enumerate(hypotheses[:n])
    ]
