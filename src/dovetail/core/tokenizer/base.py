"""What the engine, the server and the command line need of a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

__all__ = ["DecodeStream", "Message", "Tokenizer"]

Message: TypeAlias = Mapping[str, Any]
"""One turn of a conversation: ``role``, ``content`` (a string, None or parts), and more."""


class DecodeStream(Protocol):
    """Turns one sequence of tokens into text as they come."""

    def step(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete, often empty; never ends inside a character."""
        ...

    def flush(self) -> str:
        """The text held back so far, unfinished characters as U+FFFD. Ends the sequence."""
        ...


class Tokenizer(Protocol):
    """Text to token ids and back, and conversations to text. Safe to share between threads."""

    eos_token_id: int | None
    """The tokenizer's end-of-text token; a model may name more of them."""
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    special_tokens: list[str]
    """Named and added special tokens, without repeats."""
    special_token_ids: frozenset[int]
    """What ``skip_special_tokens`` leaves out."""
    vocab_size: int
    """One more than the largest token id. A model's logits may be wider."""
    chat_template: str | None
    """The default template, in jinja2; None for a base model."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``; special tokens written in ``text`` count as such.

        Args:
            text: What to encode; unpaired surrogates become U+FFFD.
            add_special_tokens: Put what the model expects around a text, such as ``<s>``.
        """
        ...

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``. Ids outside the vocabulary have no text."""
        ...

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself; part of a character shows as U+FFFD."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that one token stands for, which may be part of a character."""
        ...

    def new_stream(
        self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> DecodeStream:
        """Start detokenising what follows a prompt.

        Args:
            prompt_token_ids: What went before: decides whether a leading space is kept.
            skip_special_tokens: Leave special tokens out of the text.
        """
        ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str | list[int]:
        """Lay out a conversation as the model was trained to see it.

        The result holds its special tokens already: encode it with ``add_special_tokens=False``.

        Args:
            messages: The conversation, oldest turn first.
            add_generation_prompt: End with what opens the model's turn.
            continue_final_message: Leave the last message open, so that the model goes on in it.
            tools: Functions that the model may call, as OpenAI describes them.
            documents: Passages for retrieval, each with ``title`` and ``text``.
            chat_template: Template text, or the name of one of the model's templates.
            template_kwargs: Further variables for the template, such as ``enable_thinking``.

        Returns:
            Text; token ids from a tokenizer that knows no text form of a conversation.

        Raises:
            RequestError: There is no template, or it refused these messages.
        """
        ...
