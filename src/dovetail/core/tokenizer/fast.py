"""The usual tokenizer: ``tokenizer.json`` read by the ``tokenizers`` library."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dovetail.core.tokenizer.assemble import assemble
from dovetail.core.tokenizer.base import DecodeStream, Message
from dovetail.core.tokenizer.chat import ChatTemplates
from dovetail.core.tokenizer.files import TokenizerFiles
from dovetail.core.tokenizer.pieces import ByteRule, TokenTable, byte_rule
from dovetail.core.tokenizer.stream import ByteStream, WindowStream

__all__ = ["FastTokenizer", "clean_up_spaces", "without_surrogates"]


class FastTokenizer:
    """Encodes, decodes and streams as the transformers library's ``AutoTokenizer`` would.

    Args:
        files: A folder that has ``tokenizer.json``.

    Raises:
        UnknownLayoutError: Something in the folder is left to the transformers library.
        CheckpointError: ``tokenizer.json`` cannot be read.
    """

    def __init__(self, files: TokenizerFiles) -> None:
        assembled = assemble(files)
        self._backend = assembled.backend
        self._clean_up = assembled.clean_up
        named = assembled.named
        self.bos_token = named.get("bos_token")
        self.eos_token = named.get("eos_token")
        self.pad_token = named.get("pad_token")
        eos = self.eos_token
        self.eos_token_id = None if eos is None else self._backend.token_to_id(eos)
        self.special_tokens = assembled.special_tokens
        added = self._backend.get_added_tokens_decoder()
        self.special_token_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max(self._backend.get_vocab_size(), max(added, default=-1) + 1)
        self._chat = ChatTemplates(files.chat_templates(), named)
        self.chat_template = self._chat.default
        self._rule = self._byte_rule()
        if self._rule is not None:
            name_of, to_bytes = self._backend.id_to_token, self._rule.to_bytes
            self._bytes = TokenTable(name_of, to_bytes)
            self._plain_bytes = TokenTable(name_of, to_bytes, self.special_token_ids)

    def _byte_rule(self) -> ByteRule | None:
        decoder = self._backend.decoder
        if decoder is None or self._clean_up:
            return None
        return byte_rule(json.loads(decoder.__getstate__()))

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of ``text``."""
        try:
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:  # how the library rejects a string that is not UTF-8
            text = without_surrogates(text)
            return self._backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of ``ids``."""
        try:
            text = self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except OverflowError:
            known = [token_id for token_id in ids if 0 <= token_id < 1 << 32]
            text = self._backend.decode(known, skip_special_tokens=skip_special_tokens)
        return clean_up_spaces(text) if self._clean_up else text

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself."""
        if self._rule is None:
            return self.decode([token_id], skip_special_tokens=False)
        return self._bytes[token_id].decode(errors=self._rule.errors)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of one token, which may be part of a character."""
        return self.token_text(token_id).encode() if self._rule is None else self._bytes[token_id]

    def new_stream(
        self, prompt_token_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> DecodeStream:
        """Start detokenising what follows a prompt.

        The pieces make up ``decode`` of the whole, with two exceptions: ``ByteFallback`` gives up
        all bytes around an invalid one, here only that one is lost; and where a tokenizer cleans
        spaces up, those before a word that was not known yet remain.
        """
        rule = self._rule
        if rule is not None:
            table = self._plain_bytes if skip_special_tokens else self._bytes
            return ByteStream(table, rule.errors, rule.num_stripped, prompt_token_ids)
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
    ) -> str:
        """Lay out a conversation as the model was trained to see it."""
        return self._chat.render(
            messages,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            documents=documents,
            chat_template=chat_template,
            template_kwargs=template_kwargs,
        )


def without_surrogates(text: str) -> str:
    """``text`` with surrogates joined to characters where they pair up, else as U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


_SPACED = {
    " .": ".",
    " ?": "?",
    " !": "!",
    " ,": ",",
    " ' ": "'",
    " n't": "n't",
    " 'm": "'m",
    " 's": "'s",
    " 've": "'ve",
    " 're": "'re",
}


def clean_up_spaces(text: str) -> str:
    """Take out spaces before punctuation, as ``clean_up_tokenization_spaces`` asks."""
    for spaced, joined in _SPACED.items():
        text = text.replace(spaced, joined)
    return text
