"""Log-probabilities in the two forms that OpenAI's endpoints use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dovetail.core.request import Logprob, TokenLogprobs
from dovetail.core.server.replies import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    TopLogprob,
)
from dovetail.core.tokenizer import Tokenizer

__all__ = ["LOWEST", "LogprobWriter", "prompt_logprobs"]

LOWEST = -9999.0
"""Stands for minus infinity, which JSON cannot say."""


class LogprobWriter:
    """Writes candidates as clients want to see them.

    Args:
        tokenizer: Names tokens that the engine did not; None names all by their ids.
        as_token_ids: Write every token as ``token_id:N``.
    """

    def __init__(self, tokenizer: Tokenizer | None, as_token_ids: bool) -> None:
        self._tokenizer = tokenizer
        self._as_token_ids = as_token_ids or tokenizer is None

    def token(self, token_id: int, candidate: Logprob | None = None) -> str:
        """What a token is called in an answer."""
        if self._as_token_ids or self._tokenizer is None:
            return f"token_id:{token_id}"
        if candidate is not None and candidate.decoded_token is not None:
            return candidate.decoded_token
        return self._tokenizer.token_text(token_id)

    def completion(
        self,
        token_ids: Sequence[int],
        candidates: Sequence[TokenLogprobs | None],
        offset: int = 0,
    ) -> CompletionLogprobs:
        """The form of /v1/completions; ``offset`` is the text before the first token."""
        result = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token_id, position in zip(token_ids, candidates, strict=False):
            chosen = position.get(token_id) if position is not None else None
            name = self.token(token_id, chosen)
            result.tokens.append(name)
            result.token_logprobs.append(None if chosen is None else _finite(chosen.logprob))
            result.top_logprobs.append(None if position is None else self._top(position))
            result.text_offset.append(offset)
            offset += len(name)
        return result

    def _top(self, position: TokenLogprobs) -> dict[str, float]:
        top: dict[str, float] = {}
        for token_id, candidate in _ranked(position):
            top.setdefault(self.token(token_id, candidate), _finite(candidate.logprob))
        return top

    def chat(
        self, token_ids: Sequence[int], candidates: Sequence[TokenLogprobs], num_top: int
    ) -> ChatLogprobs:
        """The form of /v1/chat/completions, with ``num_top`` rivals for each token."""
        content = []
        for token_id, position in zip(token_ids, candidates, strict=False):
            chosen = position.get(token_id, Logprob(logprob=LOWEST, rank=0))
            content.append(
                ChatLogprob(
                    token=self.token(token_id, chosen),
                    logprob=_finite(chosen.logprob),
                    bytes=self._bytes(token_id),
                    top_logprobs=[
                        self._rival(other, candidate)
                        for other, candidate in _ranked(position)[:num_top]
                    ],
                )
            )
        return ChatLogprobs(content=content)

    def _rival(self, token_id: int, candidate: Logprob) -> TopLogprob:
        return TopLogprob(
            token=self.token(token_id, candidate),
            logprob=_finite(candidate.logprob),
            bytes=self._bytes(token_id),
        )

    def _bytes(self, token_id: int) -> list[int] | None:
        return None if self._tokenizer is None else list(self._tokenizer.token_bytes(token_id))


def prompt_logprobs(
    positions: Sequence[TokenLogprobs | None], writer: LogprobWriter
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's form of ``prompt_logprobs``: by position, then by token id."""
    return [
        None
        if position is None
        else {
            str(token_id): {
                "logprob": _finite(candidate.logprob),
                "rank": candidate.rank,
                "decoded_token": writer.token(token_id, candidate),
            }
            for token_id, candidate in position.items()
        }
        for position in positions
    ]


def _ranked(position: TokenLogprobs) -> list[tuple[int, Logprob]]:
    return sorted(position.items(), key=lambda item: item[1].rank)


def _finite(logprob: float) -> float:
    """``logprob``, or ``LOWEST`` for minus infinity and for what is not a number."""
    return logprob if logprob > LOWEST else LOWEST
