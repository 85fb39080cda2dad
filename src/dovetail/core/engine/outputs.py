"""The front end's half of an engine step: what comes back, as text, per request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from dovetail.core.engine.api import CompletionDelta, RequestDelta
from dovetail.core.engine.chosen import BestOf, beam_deltas
from dovetail.core.engine.completion import CompletionStream, LogprobNamer
from dovetail.core.errors import DovetailError, RequestFailedError
from dovetail.core.faults import fault
from dovetail.core.plugins.registry import describe_error
from dovetail.core.request import (
    CompletionOutput,
    FinishReason,
    PromptTokens,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from dovetail.core.tokenizer import Tokenizer
from dovetail.core.update import TokenAlternatives, Update

__all__ = ["OutputAccumulator", "OutputProcessor", "ProcessResult"]

_log = logging.getLogger(__name__)


class ProcessResult(NamedTuple):
    """What one message of the engine means to the front end."""

    deltas: list[tuple[str, RequestDelta | DovetailError]]
    """At most one per request; after an error no more of that request."""
    aborts: list[int]
    """Sequences that the engine still runs, but that have ended: it has to be told."""


class _OpenRequest:
    """A request with at least one sequence that runs."""

    __slots__ = (
        "best_of",
        "completions",
        "id",
        "n",
        "num_cached_tokens",
        "num_prompt_tokens",
        "prompt_logprobs",
        "start",
    )

    def __init__(
        self,
        request_id: str,
        num_prompt_tokens: int,
        params: SamplingParams,
        start: Callable[[int], CompletionStream],
    ) -> None:
        self.id = request_id
        self.n = params.n
        self.start = start
        """Begins the completion of an index."""
        self.best_of: BestOf | None = None
        if params.best_of is not None and not params.use_beam_search:
            self.best_of = BestOf(params)
        self.num_prompt_tokens = num_prompt_tokens
        self.num_cached_tokens = 0
        self.completions: dict[int, CompletionStream] = {}
        """The sequences that still run, by id."""
        self.prompt_logprobs: dict[int, list[TokenLogprobs | None]] | None = None
        """What has come so far, by sequence; None if not asked for, or given already."""
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = {}

    def take_prompt_logprobs(self) -> list[TokenLogprobs | None] | None:
        """Those of the first sequence that has all of them, once."""
        if self.prompt_logprobs is None:
            return None
        if self.num_prompt_tokens <= 1:
            whole: list[TokenLogprobs | None] | None = [None] * self.num_prompt_tokens
        else:
            candidates = self.prompt_logprobs.values()
            whole = next((c for c in candidates if len(c) >= self.num_prompt_tokens), None)
        if whole is not None:
            self.prompt_logprobs = None
        return whole


class OutputProcessor:
    """Keeps what is needed to turn tokens into text, for all requests of one engine.

    Belongs to one thread.

    Args:
        tokenizer: None gives token ids alone.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer
        self._namer = LogprobNamer(tokenizer)
        self._requests: dict[str, _OpenRequest] = {}
        self._owners: dict[int, _OpenRequest] = {}

    def add(
        self,
        request_id: str,
        prompt: PromptTokens,
        params: SamplingParams,
        sequence_ids: Sequence[int],
        stop_token_ids: Iterable[int],
    ) -> None:
        """Expect updates of a new request.

        Args:
            request_id: Not in use.
            prompt: The prompt.
            params: As the client gave them, with ``n``.
            sequence_ids: The engine's ids of the completions, in the order of their index.
            stop_token_ids: Tokens that end a sequence; their text is left out.

        Raises:
            RequestError: Stop strings, but no text to look for them in.
        """
        stop_ids = frozenset(stop_token_ids)

        def start(index: int) -> CompletionStream:
            return CompletionStream(index, self._tokenizer, self._namer, prompt, params, stop_ids)

        request = _OpenRequest(request_id, len(prompt.token_ids), params, start)
        for index, sequence_id in enumerate(sequence_ids):
            request.completions[sequence_id] = start(index)
        self._requests[request_id] = request
        self._owners.update(dict.fromkeys(sequence_ids, request))

    def process(self, updates: Iterable[Update]) -> ProcessResult:
        """What the updates of one step mean. Those of sequences that have ended are ignored."""
        deltas: dict[str, RequestDelta | DovetailError] = {}
        aborts: list[int] = []
        owners = self._owners
        for update in updates:
            request = owners.get(update.id)
            if request is None:
                continue
            error = update.error
            if error is None:
                try:
                    self._take(request, update, deltas, aborts)
                except Exception as raised:
                    _log.exception("the output of request %s cannot be shown", request.id)
                    error = f"its output cannot be shown: {describe_error(raised)}"
            if error is not None:
                over = update.error is not None or update.finish_reason is not None
                ended = update.id if over else None
                aborts += [number for number in self.abort(request.id) if number != ended]
                deltas[request.id] = RequestFailedError(error)
        return ProcessResult(list(deltas.items()), aborts)

    def _take(
        self,
        request: _OpenRequest,
        update: Update,
        deltas: dict[str, RequestDelta | DovetailError],
        aborts: list[int],
    ) -> None:
        """Add what an update of a request means to the deltas, and whom it ends to the aborts."""
        completion = request.completions[update.id]
        if update.prompt_logprobs is not None:
            self._add_prompt_logprobs(request, update.id, update.prompt_logprobs)
        if update.num_cached_tokens is not None and completion.index == 0:
            request.num_cached_tokens = update.num_cached_tokens
        if update.beams is not None:
            news = beam_deltas(update.beams, request.n, request.start)
            self._close(request, update.id)
            _collect(deltas, request, *news)
            return
        if not update.token_ids and update.finish_reason is None:
            return
        new = completion.push(update)
        if new.finish_reason is not None:
            self._close(request, update.id)
            if update.finish_reason is None:
                aborts.append(update.id)
        if request.best_of is None:
            _collect(deltas, request, new)
            return
        request.best_of.add(new)
        if not request.completions:
            _collect(deltas, request, *request.best_of.best())

    def abort(self, request_id: str) -> list[int]:
        """Forget a request; returns its sequences that run, which the engine has to give up."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return []
        ids = list(request.completions)
        for sequence_id in ids:
            del self._owners[sequence_id]
        return ids

    @property
    def num_open(self) -> int:
        """Sequences that have not ended."""
        return len(self._owners)

    def is_open(self, sequence_id: int) -> bool:
        """Whether the sequence has not ended yet."""
        return sequence_id in self._owners

    def emitted(self, sequence_id: int) -> list[int]:
        """The tokens of an open sequence so far, for a new engine process to go on from.

        The log-probabilities of a prompt that had come in part are forgotten: they come again.
        """
        request = self._owners[sequence_id]
        if request.prompt_logprobs is not None:
            request.prompt_logprobs.pop(sequence_id, None)
        return list(request.completions[sequence_id].token_ids)

    def _add_prompt_logprobs(
        self, request: _OpenRequest, sequence_id: int, positions: list[TokenAlternatives]
    ) -> None:
        if request.prompt_logprobs is not None:
            fault("frontend.logprobs", sequence_id)
            so_far = request.prompt_logprobs.setdefault(sequence_id, [None])
            so_far += self._namer.name(positions)

    def _close(self, request: _OpenRequest, sequence_id: int) -> None:
        del self._owners[sequence_id]
        del request.completions[sequence_id]
        if not request.completions:
            del self._requests[request.id]


def _collect(
    deltas: dict[str, RequestDelta | DovetailError], request: _OpenRequest, *new: CompletionDelta
) -> None:
    """Add ``new`` to the delta of its request."""
    delta = deltas.get(request.id)
    if not isinstance(delta, RequestDelta):
        deltas[request.id] = delta = RequestDelta(
            completions=[*new],
            finished=not request.completions,
            num_prompt_tokens=request.num_prompt_tokens,
        )
    else:
        delta.completions += new
        delta.finished = not request.completions
    delta.num_cached_tokens = request.num_cached_tokens
    if request.prompt_logprobs is not None:
        delta.prompt_logprobs = request.take_prompt_logprobs()


class _Completion:
    """One completion so far; its text is joined only when it is asked for."""

    __slots__ = (
        "cumulative_logprob",
        "finish_reason",
        "index",
        "logprobs",
        "pieces",
        "stop_reason",
        "token_ids",
    )

    def __init__(self, index: int) -> None:
        self.index = index
        self.pieces: list[str] = []
        self.token_ids: list[int] = []
        self.logprobs: list[TokenLogprobs] | None = None
        self.cumulative_logprob: float | None = None
        self.finish_reason: str | None = None
        self.stop_reason: int | str | None = None

    def add(self, delta: CompletionDelta) -> None:
        self.pieces.append(delta.text)
        self.token_ids += delta.token_ids
        self.finish_reason, self.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
            pairs = zip(delta.token_ids, delta.logprobs, strict=True)
            new = sum(candidates[token_id].logprob for token_id, candidates in pairs)
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + new
        if delta.cumulative_logprob is not None:
            self.cumulative_logprob = delta.cumulative_logprob

    def output(self) -> CompletionOutput:
        self.pieces = ["".join(self.pieces)]
        return CompletionOutput(
            index=self.index,
            text=self.pieces[0],
            token_ids=list(self.token_ids),
            cumulative_logprob=self.cumulative_logprob,
            logprobs=None if self.logprobs is None else list(self.logprobs),
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
        )


class OutputAccumulator:
    """Adds the deltas of one request up. Takes time linear in their number, however many.

    Args:
        request_id: For the output.
        prompt: For the output.
    """

    def __init__(self, request_id: str, prompt: PromptTokens) -> None:
        self._request_id = request_id
        self._prompt = prompt
        self._completions: dict[int, _Completion] = {}
        self._finished = False
        self._num_cached_tokens = 0
        self._prompt_logprobs: list[TokenLogprobs | None] | None = None

    def add(self, delta: RequestDelta) -> None:
        """Take the next delta."""
        for new in delta.completions:
            completion = self._completions.get(new.index)
            if completion is None:
                completion = self._completions[new.index] = _Completion(new.index)
            completion.add(new)
        self._finished = delta.finished
        self._num_cached_tokens = delta.num_cached_tokens
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs = delta.prompt_logprobs

    def end(self, reason: FinishReason) -> None:
        """End what has not ended, with this ``finish_reason``: ``error`` or ``timeout``."""
        self._finished = True
        self._completions.setdefault(0, _Completion(0))
        for completion in self._completions.values():
            completion.finish_reason = completion.finish_reason or reason

    def output(self) -> RequestOutput:
        """All there is so far, in lists of its own. Takes time linear in its size."""
        return RequestOutput(
            request_id=self._request_id,
            prompt=self._prompt.text,
            prompt_token_ids=self._prompt.token_ids,
            outputs=[self._completions[index].output() for index in sorted(self._completions)],
            finished=self._finished,
            prompt_logprobs=self._prompt_logprobs,
            num_cached_tokens=self._num_cached_tokens,
        )
