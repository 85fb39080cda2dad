"""Who answers in a chat: an engine of our own, or a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dovetail.core.errors import RequestError

if TYPE_CHECKING:
    from dovetail.core.bench.http import HttpClient
    from dovetail.core.engine.api import EngineClient
    from dovetail.core.request import PromptTokens, SamplingParams
    from dovetail.core.tokenizer import Tokenizer

__all__ = ["EngineTalker", "Message", "ServerTalker", "Talker"]

Message = Mapping[str, str]
"""One turn: ``role`` and ``content``."""


class Talker(Protocol):
    """Continues conversations."""

    name: str
    """What answers, for people."""
    notice: str
    """What the user should know before starting, in one line; empty if nothing."""

    def answer(self, messages: Sequence[Message]) -> AsyncIterator[str]:
        """The next turn, piece by piece. Ending the iteration ends the generation."""
        ...

    async def close(self) -> None:
        """Give everything back."""
        ...


class EngineTalker:
    """An engine in this session's own process tree."""

    def __init__(
        self, engine: EngineClient, params: SamplingParams, *, chat_template: str | None = None
    ) -> None:
        if engine.tokenizer is None:
            raise RequestError("a chat needs the tokenizer: leave out --skip-tokenizer-init")
        self.name = engine.info.name
        self._engine = engine
        self._tokenizer: Tokenizer = engine.tokenizer
        self._params = params
        self._template = chat_template
        self._templated = chat_template is not None or self._tokenizer.chat_template is not None
        self.notice = (
            ""
            if self._templated
            else "This model has no chat template: it continues what you type, as plain text."
        )

    async def answer(self, messages: Sequence[Message]) -> AsyncIterator[str]:
        """See :class:`Talker`."""
        async for delta in self._engine.stream(self._prompt(messages), self._params):
            for part in delta.completions:
                if part.text:
                    yield part.text

    def _prompt(self, messages: Sequence[Message]) -> PromptTokens:
        from dovetail.core.request import PromptTokens

        if not self._templated:
            text = "\n".join(message["content"] for message in messages)
            return PromptTokens(text=text, token_ids=self._tokenizer.encode(text))
        laid_out = self._tokenizer.apply_chat_template(messages, chat_template=self._template)
        if not isinstance(laid_out, str):
            return PromptTokens(text=None, token_ids=laid_out)
        ids = self._tokenizer.encode(laid_out, add_special_tokens=False)
        return PromptTokens(text=laid_out, token_ids=ids)

    async def close(self) -> None:
        """See :class:`Talker`."""
        await self._engine.close()


class ServerTalker:
    """An OpenAI-compatible server."""

    notice = ""

    def __init__(self, client: HttpClient, model: str, params: Mapping[str, Any]) -> None:
        self.name = f"{model} at {client.base_url}"
        self._client = client
        self._model = model
        self._params = dict(params)

    async def answer(self, messages: Sequence[Message]) -> AsyncIterator[str]:
        """See :class:`Talker`."""
        from dovetail.core.bench.client import stream_chat

        async for piece in stream_chat(self._client, self._model, messages, **self._params):
            yield piece

    async def close(self) -> None:
        """See :class:`Talker`."""
        await self._client.close()
