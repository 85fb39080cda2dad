"""Answers of /v1/chat/completions, whole and in chunks."""

from __future__ import annotations

import msgspec

from dovetail.core.engine.api import CompletionDelta, RequestDelta
from dovetail.core.request import FinishReason, TokenLogprobs
from dovetail.core.server.answers import Gathered, Identity, Tally, gather
from dovetail.core.server.jobs import Deltas, Job
from dovetail.core.server.logprobs import LogprobWriter, prompt_logprobs
from dovetail.core.server.protocol import ChatCompletionRequest
from dovetail.core.server.replies import (
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatDelta,
    ChatLogprobs,
    ChatReplyMessage,
    ReplyFunction,
    ReplyToolCall,
)
from dovetail.core.server.sse import SLOT, frame, text_frame
from dovetail.core.server.tools import CallText, ForcedCall
from dovetail.core.tokenizer import Tokenizer

__all__ = ["ChatAnswer", "ChatStream"]


class ChatAnswer:
    """The answer to one conversation: what is asked for, and the parts it is built from."""

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        request: ChatCompletionRequest,
        identity: Identity,
        jobs: list[Job],
        role: str,
        call: ForcedCall | None = None,
    ) -> None:
        self.request = request
        self.call = call
        self.jobs = jobs
        self.n = jobs[0].params.n
        self.tally = Tally(request, jobs)
        self.identity = identity
        self.role = role
        self._writer = LogprobWriter(tokenizer, bool(request.return_tokens_as_token_ids))

    async def whole(self, deltas: Deltas) -> ChatCompletion:
        """The answer in one piece."""
        (completions,), (scores,) = await gather(deltas, self.jobs, self.tally)
        identity = self.identity
        result = ChatCompletion(
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.system_fingerprint,
            choices=[self._choice(i, gathered) for i, gathered in enumerate(completions)],
            usage=self.tally.usage(),
        )
        if self.request.return_token_ids:
            result.prompt_token_ids = self.jobs[0].prompt.token_ids
        if self.request.prompt_logprobs is not None:
            result.prompt_logprobs = prompt_logprobs(scores, self._writer)
        return result

    def _choice(self, index: int, gathered: Gathered) -> ChatChoice:
        choice = ChatChoice(
            index=index,
            message=self._message(gathered.text),
            logprobs=self.logprobs(gathered.token_ids, gathered.logprobs),
            finish_reason=self.finish_reason(gathered.finish_reason),
            stop_reason=gathered.stop_reason,
        )
        if self.request.return_token_ids:
            choice.token_ids = gathered.token_ids
        return choice

    def _message(self, text: str) -> ChatReplyMessage:
        """The text as it is, or as the call that it makes."""
        if self.call is None:
            return ChatReplyMessage(role=self.role, content=text)
        parts = CallText(self.call)
        arguments = parts.feed(text, last=True)
        if parts.name is None:
            return ChatReplyMessage(role=self.role, content=text)
        function = ReplyFunction(name=parts.name, arguments=arguments)
        made = ReplyToolCall(id=parts.id, type="function", function=function)
        return ChatReplyMessage(role=self.role, content=None, tool_calls=[made])

    def finish_reason(self, reason: FinishReason | None) -> FinishReason | None:
        """The engine's reason as OpenAI has it."""
        return reason if self.call is None else self.call.reason(reason)

    def logprobs(
        self, token_ids: list[int], rows: list[TokenLogprobs] | None
    ) -> ChatLogprobs | None:
        """Scores of ``token_ids``, if they were asked for."""
        if not self.request.logprobs:
            return None
        return self._writer.chat(token_ids, rows or [], self.jobs[0].params.logprobs or 0)


class ChatStream:
    """The same answer in chunks: the role first, then text, then an empty one that ends it."""

    def __init__(self, answer: ChatAnswer) -> None:
        request = answer.request
        self._answer = answer
        self._shows_tokens = bool(request.logprobs or request.return_token_ids)
        self._calls: dict[int, CallText] = {}
        self._plain = not (self._shows_tokens or answer.tally.continuous or answer.call)
        self._frames: dict[int, tuple[bytes, bytes]] = {}

    def start(self) -> bytes:
        """See ``Renderer``."""
        frames = []
        for index in range(self._answer.n):
            delta = ChatDelta(role=self._answer.role, content="")
            chunk = self._chunk([ChatChunkChoice(index=index, delta=delta)])
            if index == 0 and self._answer.request.return_token_ids:
                chunk.prompt_token_ids = self._answer.jobs[0].prompt.token_ids
            frames.append(frame(chunk))
        return b"".join(frames)

    def delta(self, prompt_index: int, delta: RequestDelta) -> bytes:
        """See ``Renderer``."""
        self._answer.tally.add(prompt_index, delta)
        frames = []
        for completion in delta.completions:
            if not self._plain:
                frames.append(self._detailed(completion))
            elif completion.text:
                before, after = self._frames.get(completion.index) or self._text_frame(
                    completion.index
                )
                frames.append(before + msgspec.json.encode(completion.text) + after)
            if completion.finish_reason is not None:
                frames.append(self._finish(completion))
        return b"".join(frames)

    def _text_frame(self, index: int) -> tuple[bytes, bytes]:
        delta = ChatDelta(content=SLOT)
        parts = text_frame(self._chunk([ChatChunkChoice(index=index, delta=delta)]))
        self._frames[index] = parts
        return parts

    def _detailed(self, completion: CompletionDelta) -> bytes:
        delta = ChatDelta(content=completion.text)
        if self._answer.call is not None:
            delta = self._call_delta(self._answer.call, completion)
        shows_tokens = self._shows_tokens and completion.token_ids
        if not (delta.content or delta.tool_calls or shows_tokens):
            return b""
        choice = ChatChunkChoice(
            index=completion.index,
            delta=delta,
            logprobs=self._answer.logprobs(completion.token_ids, completion.logprobs),
        )
        if self._answer.request.return_token_ids:
            choice.token_ids = completion.token_ids
        return frame(self._chunk([choice]))

    def _call_delta(self, call: ForcedCall, completion: CompletionDelta) -> ChatDelta:
        """What is new of a call: first its name, then its arguments piece by piece."""
        parts = self._calls.setdefault(completion.index, CallText(call))
        was_known = parts.name is not None
        last = completion.finish_reason is not None
        arguments = parts.feed(completion.text, last=last)
        if parts.name is None or (was_known and not arguments):
            return ChatDelta()
        made = ReplyToolCall(index=0, function=ReplyFunction(arguments=arguments))
        if not was_known:
            made.id, made.type, made.function.name = parts.id, "function", parts.name
        return ChatDelta(tool_calls=[made])

    def _finish(self, completion: CompletionDelta) -> bytes:
        choice = ChatChunkChoice(
            index=completion.index,
            delta=ChatDelta(),
            finish_reason=self._answer.finish_reason(completion.finish_reason),
            stop_reason=completion.stop_reason,
        )
        return frame(self._chunk([choice]))

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatChunk:
        identity = self._answer.identity
        chunk = ChatChunk(
            id=identity.id,
            created=identity.created,
            model=identity.model,
            system_fingerprint=identity.system_fingerprint,
            choices=choices,
        )
        if self._answer.tally.continuous:
            chunk.usage = self._answer.tally.usage()
        return chunk

    def end(self) -> bytes:
        """See ``Renderer``."""
        if not self._answer.tally.at_end:
            return b""
        chunk = self._chunk([])
        chunk.usage = self._answer.tally.usage()
        return frame(chunk)
