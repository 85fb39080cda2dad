"""Any other tokenizer, through the transformers library, which takes seconds to import."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dovetail.core.errors import CheckpointError, RequestError
from dovetail.core.tokenizer.base import DecodeStream, Message
from dovetail.core.tokenizer.chat import ChatTemplates
from dovetail.core.tokenizer.fast import without_surrogates
from dovetail.core.tokenizer.files import TokenizerFiles
from dovetail.core.tokenizer.stream import WindowStream

__all__ = ["SlowTokenizer"]

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class SlowTokenizer:
    """Wraps the transformers library's ``AutoTokenizer``.

    Args:
        files: The model folder.
        trust_remote_code: Run Python code that the folder brings.

    Raises:
        CheckpointError: The library cannot read the folder, or it brings code that is not trusted.
    """

    def __init__(self, files: TokenizerFiles, *, trust_remote_code: bool = False) -> None:
        self._inner = _load(files, trust_remote_code)
        inner = self._inner
        self.bos_token: str | None = _text(inner.bos_token)
        self.eos_token: str | None = _text(inner.eos_token)
        self.pad_token: str | None = _text(inner.pad_token)
        self.eos_token_id: int | None = inner.eos_token_id
        self.special_tokens: list[str] = [str(token) for token in inner.all_special_tokens]
        added = _added_tokens(inner)
        marked = {int(i) for i, token in added.items() if getattr(token, "special", False)}
        self.special_token_ids = frozenset(marked | set(inner.all_special_ids))
        self.vocab_size = max(len(inner), max(added, default=-1) + 1)
        named = {name: str(token) for name, token in inner.special_tokens_map.items()}
        self._chat = ChatTemplates(files.chat_templates(), named)
        self.chat_template = self._chat.default
        self._lays_out_itself = _overrides_chat(inner)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        text = without_surrogates(text)
        return list(self._inner.encode(text, add_special_tokens=add_special_tokens))

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``."""
        known = [token_id for token_id in ids if 0 <= token_id < self.vocab_size]
        return str(self._inner.decode(known, skip_special_tokens=skip_special_tokens))

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token; of part of a character, U+FFFD if the library hides them."""
        if not 0 <= token_id < self.vocab_size:
            return b""
        name = self._inner.convert_ids_to_tokens(token_id)
        if isinstance(name, bytes):
            return name
        if isinstance(name, str) and (byte := _BYTE.fullmatch(name)):
            return bytes.fromhex(byte[1])
        if isinstance(name, str) and "▁" in name:
            return name.replace("▁", " ").encode()
        return self.decode([token_id], skip_special_tokens=False).encode()

    def new_stream(
        self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> DecodeStream:
        """Start detokenising what follows a prompt."""
        left_out = self.special_token_ids if skip_special_tokens else frozenset[int]()
        return WindowStream(
            lambda ids: self.decode(ids, skip_special_tokens=False), left_out, prompt_token_ids
        )

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
        """Lay out a conversation; token ids from classes that have their own way to do so."""
        arguments: dict[str, Any] = {
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "documents": documents,
            "chat_template": chat_template,
        }
        if chat_template is None and self._lays_out_itself:
            return self._own_layout(messages, {**arguments, **(template_kwargs or {})})
        return self._chat.render(messages, **arguments, template_kwargs=template_kwargs)

    def _own_layout(self, messages: Sequence[Message], arguments: dict[str, Any]) -> list[int]:
        given = {name: value for name, value in arguments.items() if value is not None}
        try:
            ids = self._inner.apply_chat_template(
                [dict(message) for message in messages], tokenize=True, return_dict=False, **given
            )
        except Exception as error:
            raise RequestError(
                f"The model's tokenizer rejects this conversation: {error}", param="messages"
            ) from error
        return [int(token_id) for token_id in ids]


def _load(files: TokenizerFiles, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            str(Path(files.folder)), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        hint = ""
        if files.has_code and not trust_remote_code:
            hint = (
                " The folder brings its own tokenizer code: read it, and if you trust it, allow it"
                " with --trust-remote-code."
            )
        raise CheckpointError(
            f"{files.folder}: the transformers library cannot read the tokenizer:"
            f" {type(error).__name__}: {error}{hint}"
        ) from error


def _added_tokens(inner: Any) -> dict[int, Any]:
    """By id; none from a class that has them in no mapping."""
    added = getattr(inner, "added_tokens_decoder", None)
    return dict(added) if isinstance(added, Mapping) else {}


def _overrides_chat(inner: Any) -> bool:
    from transformers import PreTrainedTokenizerBase

    usual = PreTrainedTokenizerBase.apply_chat_template
    return getattr(type(inner), "apply_chat_template", usual) is not usual


def _text(token: Any) -> str | None:
    return None if token is None else str(token)
