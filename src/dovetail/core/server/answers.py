"""What all parts of one answer share: identity, counts, and the gathering of text."""

from __future__ import annotations

import contextlib
import time
import uuid
from dataclasses import dataclass, field

import msgspec
from starlette.responses import Response

from dovetail.core.engine.api import CompletionDelta, RequestDelta
from dovetail.core.request import FinishReason, TokenLogprobs
from dovetail.core.server.context import Context
from dovetail.core.server.jobs import Deltas, Job
from dovetail.core.server.protocol import GenerationRequest
from dovetail.core.server.replies import PromptTokenDetails, Usage

__all__ = [
    "Gathered",
    "Identity",
    "PromptScores",
    "Tally",
    "gather",
    "json_response",
    "new_identity",
]

PromptScores = list[TokenLogprobs | None]
"""Log-probabilities of a prompt's tokens; None for the first."""


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that stay the same in every chunk of an answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str


def new_identity(context: Context, prefix: str, model: str) -> Identity:
    """A fresh id, always the server's own: a client's id is a label, never a key."""
    return Identity(
        id=f"{prefix}-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=model,
        system_fingerprint=context.fingerprint,
    )


class Tally:
    """Counts the tokens of one request, and knows when a stream should tell them."""

    def __init__(self, request: GenerationRequest, jobs: list[Job]) -> None:
        options = request.stream_options
        self.at_end = bool(options and options.include_usage)
        self.continuous = bool(options and options.continuous_usage_stats)
        self._prompt = sum(len(job.prompt.token_ids) for job in jobs)
        self._cached = [0] * len(jobs)
        self._completion = 0

    def add(self, index: int, delta: RequestDelta) -> None:
        """Count what came for prompt number ``index``."""
        self._cached[index] = delta.num_cached_tokens
        for completion in delta.completions:
            self._completion += len(completion.token_ids)

    def usage(self, *, without_completion: bool = False) -> Usage:
        """The counts so far."""
        completion = 0 if without_completion else self._completion
        return Usage(
            prompt_tokens=self._prompt,
            completion_tokens=completion,
            total_tokens=self._prompt + completion,
            prompt_tokens_details=PromptTokenDetails(cached_tokens=sum(self._cached)),
        )


@dataclass
class Gathered:
    """One completion, whole."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)

    def add(self, delta: CompletionDelta) -> None:
        """Append what is new."""
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


async def gather(
    deltas: Deltas, jobs: list[Job], tally: Tally
) -> tuple[list[list[Gathered]], list[PromptScores]]:
    """Wait for everything: the completions by prompt and number, and each prompt's scores."""
    completions = [[Gathered() for _ in range(job.params.n)] for job in jobs]
    scores: list[PromptScores] = [[] for _ in jobs]
    async with contextlib.aclosing(deltas):
        async for index, delta in deltas:
            tally.add(index, delta)
            if delta.prompt_logprobs is not None:
                scores[index] = delta.prompt_logprobs
            for completion in delta.completions:
                completions[index][completion.index].add(completion)
    return completions, scores


def json_response(body: msgspec.Struct) -> Response:
    """A complete answer."""
    return Response(msgspec.json.encode(body), media_type="application/json")
