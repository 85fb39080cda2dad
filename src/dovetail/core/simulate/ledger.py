"""The clients' side: what each request must be given, held against what it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import msgspec

from dovetail.core.errors import InvariantError
from dovetail.core.request import Request
from dovetail.core.sampling.oracle import Answer, TokenRule
from dovetail.core.simulate.grammar import allowed
from dovetail.core.update import Hypothesis, Update

__all__ = ["Ledger"]


@dataclass
class _Entry:
    """One request that was submitted."""

    request: Request
    answer: Answer
    num_tokens: int = 0
    num_prompt_logprobs: int = 0
    end: str = ""
    """How it ended; empty while it lives."""
    may_fail: bool = False
    beams: list[Hypothesis] | None = None
    """What a beam search must find."""
    """A fault was meant for it."""


class Ledger:
    """Takes every update, and raises InvariantError at the first that must not be.

    Args:
        rule: The oracle's.
        search: What a beam search finds where nothing disturbs it.
    """

    def __init__(self, rule: TokenRule, search: Callable[[Request], list[Hypothesis]]) -> None:
        self._rule = rule
        self._search = search
        self._entries: dict[int, _Entry] = {}

    def submit(self, request: Request) -> None:
        """A request is on its way to the engine."""
        params = request.params
        answer = Answer(
            self._rule,
            request.prompt_token_ids,
            seed=None if params.is_greedy else request.seed,
            most=params.max_tokens or 0,
            allow=partial(allowed, vocab_size=self._rule.vocab_size) if request.grammar else None,
        )
        beams = self._search(request) if params.use_beam_search else None
        self._entries[request.id] = _Entry(request, answer, beams=beams)

    def abort(self, request_id: int) -> None:
        """The client has gone: nothing may come any more."""
        entry = self._entries.get(request_id)
        if entry is not None and not entry.end:
            entry.end = "abort"

    def blame(self, request_id: int) -> None:
        """A fault was meant for this request: it may end with an error."""
        self._entries[request_id].may_fail = True

    def take(self, update: Update) -> None:
        """Check one update."""
        entry = self._entries.get(update.id)
        if entry is None:
            raise InvariantError("engine", f"I14: request {update.id} was never submitted")
        if entry.end:
            raise InvariantError("engine", f"I12: request {update.id} goes on after {entry.end}")
        if update.finish_reason == "error":
            if not entry.may_fail or update.token_ids:
                raise InvariantError("request", f"I21: {update.id} failed: {update.error}")
            entry.end = "error"
            return
        if entry.beams is None:
            self._take_tokens(entry, update)
            self._take_logprobs(entry, update)
        elif update.beams != entry.beams:
            raise InvariantError("request", f"I21: beams of {update.id} are {update.beams}")
        if update.finish_reason is not None:
            entry.end = update.finish_reason

    def _take_tokens(self, entry: _Entry, update: Update) -> None:
        request = entry.request
        for token in update.token_ids:
            if self._due(entry) is not None:
                raise InvariantError("request", f"I11: {request.id} has too many tokens")
            wanted = entry.answer.at(entry.num_tokens)
            if token != wanted:
                what = f"token {entry.num_tokens} of {request.id} is {token}, not {wanted}"
                raise InvariantError("request", f"I19: {what}")
            entry.num_tokens += 1
        due = self._due(entry)
        if update.finish_reason != due:
            what = f"{request.id} ends with {update.finish_reason}, not {due}"
            raise InvariantError("request", f"I12: {what}")

    def _is_over(self, entry: _Entry) -> bool:
        last = entry.answer.token_ids[entry.num_tokens - 1] if entry.num_tokens else None
        return last in entry.request.stop_token_ids

    def _is_complete(self, entry: _Entry) -> bool:
        """Whether nothing can follow in the request's grammar."""
        return str(entry.num_tokens) == entry.request.grammar

    def _due(self, entry: _Entry) -> str | None:
        """How the request has to end with the tokens that it has; None if it has to go on."""
        if self._is_over(entry) or self._is_complete(entry):
            return "stop"
        return "length" if entry.num_tokens == entry.request.params.max_tokens else None

    def _take_logprobs(self, entry: _Entry, update: Update) -> None:
        params, given = entry.request.params, update.logprobs
        if (given is None) != (params.logprobs is None or not update.token_ids):
            raise InvariantError("request", f"I27: log-probabilities of {update.id}: {given}")
        if given is not None and [g.token_ids[0] for g in given] != update.token_ids:
            raise InvariantError("request", f"I27: {update.id} has those of other tokens")
        entry.num_prompt_logprobs += len(update.prompt_logprobs or ())
        is_first = entry.request.parent is None
        if is_first and params.prompt_logprobs is not None and update.finish_reason is not None:
            wanted = len(entry.request.prompt_token_ids) - 1
            if entry.num_prompt_logprobs != wanted:
                what = f"{entry.num_prompt_logprobs} prompt log-probabilities, not {wanted}"
                raise InvariantError("request", f"I27: {update.id} has {what}")

    def survivors(self) -> list[Request]:
        """The live requests as another engine has to take them up, in order of arrival."""
        requests = []
        for entry in self._entries.values():
            if not entry.end:
                entry.num_prompt_logprobs = 0
                emitted = entry.answer.token_ids[: entry.num_tokens]
                requests.append(msgspec.structs.replace(entry.request, emitted=emitted))
        return requests

    def work(self, budget: int) -> int:
        """Steps that live requests may still need, with ``budget`` tokens in each.

        Every token takes one, those of prompts included. Beams that have to take turns in a row are
        computed from their beginning for every token.
        """
        steps = 0
        for entry in self._entries.values():
            if entry.end:
                continue
            params = entry.request.params
            length = len(entry.request.prompt_token_ids) + (params.max_tokens or 0)
            turns = 2 * params.n * -(-length // budget) if params.use_beam_search else 1
            steps += length * turns
        return steps

    def check_over(self) -> None:
        """Every request that was submitted has its one end."""
        open_ids = [number for number, entry in self._entries.items() if not entry.end]
        if open_ids:
            raise InvariantError("engine", f"I13: requests {open_ids} have no end")

    def counts(self) -> dict[str, int]:
        """How many ended in which way."""
        ends = [entry.end or "live" for entry in self._entries.values()]
        return {end: ends.count(end) for end in sorted(set(ends))}
