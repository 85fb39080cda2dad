"""Answers of /v1/completions, whole and in chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from dovetail.core.engine.api import CompletionDelta, RequestDelta
from dovetail.core.request import TokenLogprobs
from dovetail.core.server.answers import Gathered, Identity, PromptScores, Tally, gather
from dovetail.core.server.jobs import Deltas, Job
from dovetail.core.server.logprobs import LogprobWriter, prompt_logprobs
from dovetail.core.server.protocol import CompletionRequest
from dovetail.core.server.replies import Completion, CompletionChoice, CompletionLogprobs, Usage
from dovetail.core.server.sampling import only_echoes
from dovetail.core.server.sse import SLOT, frame, text_frame
from dovetail.core.tokenizer import Tokenizer

__all__ = ["CompletionAnswer", "CompletionStream"]


class CompletionAnswer:
    """The answer to one request: what is asked for, and the parts that it is built from."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        request: CompletionRequest,
        identity: Identity,
        jobs: list[Job],
    ) -> None:
        self.request = request
        self.jobs = jobs
        self.n = jobs[0].params.n
        self.only_echo = only_echoes(request)
        self.tally = Tally(request, jobs)
        self._identity = identity
        self._tokenizer = tokenizer
        self._writer = LogprobWriter(tokenizer, bool(request.return_tokens_as_token_ids))

    async def whole(self, deltas: Deltas) -> Completion:
        """The answer in one piece."""
        completions, scores = await gather(deltas, self.jobs, self.tally)
        choices = [
            self._choice(index, i, gathered, scores[index])
            for index, of_prompt in enumerate(completions)
            for i, gathered in enumerate(of_prompt)
        ]
        return self.completion(choices, self.usage())

    def _choice(
        self, index: int, i: int, gathered: Gathered, scores: PromptScores
    ) -> CompletionChoice:
        request = self.request
        if self.only_echo:
            gathered = Gathered(finish_reason="length")
        choice = CompletionChoice(
            index=index * self.n + i,
            text=self.echoed_text(index) + gathered.text,
            finish_reason=gathered.finish_reason,
            stop_reason=gathered.stop_reason,
        )
        if request.logprobs is not None:
            ids = [*self.echoed_ids(index), *gathered.token_ids]
            rows = [*(scores if request.echo else ()), *gathered.logprobs]
            choice.logprobs = self.logprobs(ids, rows)
        if request.prompt_logprobs is not None:
            choice.prompt_logprobs = prompt_logprobs(scores, self._writer)
        if request.return_token_ids:
            choice.token_ids = gathered.token_ids
            choice.prompt_token_ids = self.jobs[index].prompt.token_ids
        return choice

    def echoed_text(self, index: int) -> str:
        """The text of prompt number ``index`` if the answer begins with it."""
        prompt = self.jobs[index].prompt
        if not self.request.echo:
            return ""
        if prompt.text is not None and self.request.truncate_prompt_tokens is None:
            return prompt.text
        if self._tokenizer is None:
            return ""
        return self._tokenizer.decode(prompt.token_ids, skip_special_tokens=False)

    def echoed_ids(self, index: int) -> Sequence[int]:
        """The tokens of prompt number ``index`` if the answer begins with them."""
        return self.jobs[index].prompt.token_ids if self.request.echo else ()

    def logprobs(
        self, ids: Sequence[int], rows: PromptScores, offset: int = 0
    ) -> CompletionLogprobs:
        """Scores of ``ids``, with as many alternatives as were asked for."""
        most = self.jobs[0].params.logprobs or 0
        trimmed = [_trimmed(row, token_id, most) for token_id, row in zip(ids, rows, strict=False)]
        return self._writer.completion(ids, trimmed, offset)

    def usage(self) -> Usage:
        """Token counts; what was made only to score the prompt does not count."""
        return self.tally.usage(without_completion=self.only_echo)

    def completion(self, choices: list[CompletionChoice], usage: Usage | None = None) -> Completion:
        """An answer, or a chunk of one."""
        identity = self._identity
        result = Completion(
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.system_fingerprint,
            choices=choices,
        )
        if usage is not None:
            result.usage = usage
        return result


def _trimmed(row: TokenLogprobs | None, token_id: int, most: int) -> TokenLogprobs | None:
    """``row`` with the ``most`` likeliest candidates and the chosen one."""
    if row is None or len(row) <= most:
        return row
    return {t: c for t, c in row.items() if c.rank <= most or t == token_id}


@dataclass
class _Choice:
    """How far one choice of a stream is."""

    index: int
    prompt_index: int
    started: bool = False
    offset: int = 0
    """Characters of the tokens so far."""
    frame: tuple[bytes, bytes] | None = None
    """What stands around the text in a chunk with nothing else."""


class CompletionStream:
    """The same answer in chunks; the last text of a choice comes with its finish reason."""

    def __init__(self, answer: CompletionAnswer) -> None:
        request = answer.request
        self._answer = answer
        self._choices = [_Choice(i, i // answer.n) for i in range(len(answer.jobs) * answer.n)]
        self._plain = not (
            request.logprobs is not None
            or request.return_token_ids
            or request.echo
            or answer.tally.continuous
        )

    def start(self) -> bytes:
        """See ``Renderer``."""
        return b""

    def delta(self, prompt_index: int, delta: RequestDelta) -> bytes:
        """See ``Renderer``."""
        answer = self._answer
        answer.tally.add(prompt_index, delta)
        frames = []
        for completion in delta.completions:
            choice = self._choices[prompt_index * answer.n + completion.index]
            if self._plain and completion.finish_reason is None:
                if completion.text:
                    before, after = choice.frame or self._text_frame(choice)
                    frames.append(before + msgspec.json.encode(completion.text) + after)
                continue
            if not choice.started:
                frames.append(self._first(choice, delta))
            if not answer.only_echo:
                frames.append(self._next(choice, completion))
        return b"".join(frames)

    def _text_frame(self, choice: _Choice) -> tuple[bytes, bytes]:
        chunk = self._answer.completion([CompletionChoice(index=choice.index, text=SLOT)])
        choice.frame = text_frame(chunk)
        return choice.frame

    def _first(self, choice: _Choice, delta: RequestDelta) -> bytes:
        """The prompt, if it is to be seen."""
        answer, request = self._answer, self._answer.request
        choice.started = True
        if not request.echo and not request.return_token_ids:
            return b""
        part = CompletionChoice(index=choice.index, text=answer.echoed_text(choice.prompt_index))
        if request.echo and request.logprobs is not None:
            ids = answer.echoed_ids(choice.prompt_index)
            part.logprobs = answer.logprobs(ids, delta.prompt_logprobs or [])
            choice.offset = sum(len(token) for token in part.logprobs.tokens)
        if request.return_token_ids:
            part.token_ids = []
            part.prompt_token_ids = answer.jobs[choice.prompt_index].prompt.token_ids
        if answer.only_echo:
            part.finish_reason = "length"
        return self._frame(part)

    def _next(self, choice: _Choice, completion: CompletionDelta) -> bytes:
        """What is new, in full detail."""
        request = self._answer.request
        shows_tokens = request.logprobs is not None or request.return_token_ids
        if not (completion.text or completion.finish_reason or shows_tokens):
            return b""
        part = CompletionChoice(
            index=choice.index,
            text=completion.text,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
        )
        if request.logprobs is not None:
            rows: PromptScores = [*(completion.logprobs or ())]
            part.logprobs = self._answer.logprobs(completion.token_ids, rows, choice.offset)
            choice.offset += sum(len(token) for token in part.logprobs.tokens)
        if request.return_token_ids:
            part.token_ids = completion.token_ids
        return self._frame(part)

    def _frame(self, part: CompletionChoice) -> bytes:
        usage = self._answer.usage() if self._answer.tally.continuous else None
        return frame(self._answer.completion([part], usage))

    def end(self) -> bytes:
        """See ``Renderer``."""
        if not self._answer.tally.at_end:
            return b""
        return frame(self._answer.completion([], self._answer.usage()))
