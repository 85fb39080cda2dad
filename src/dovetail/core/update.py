"""What the engine says of one sequence after a step."""

from __future__ import annotations

import msgspec

from dovetail.core.request import FinishReason

__all__ = ["Hypothesis", "TokenAlternatives", "Update"]


class TokenAlternatives(msgspec.Struct, frozen=True, array_like=True):
    """Log-probabilities of one position: the chosen token first, then the likeliest."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int
    """Rank of the chosen token; 1 is the likeliest."""


class Hypothesis(msgspec.Struct, frozen=True, array_like=True):
    """One of the continuations that a beam search ends with."""

    token_ids: list[int]
    """What follows the prompt; the token that ended it only if the request includes it."""
    cumulative_logprob: float
    """Of all its tokens, the one that ended it among them."""
    finish_reason: FinishReason
    stop_reason: int | None = None
    """The stop token that ended it, if it was one of the request's own."""
    logprobs: list[TokenAlternatives] | None = None
    """One per token of ``token_ids``."""


class Update(msgspec.Struct, array_like=True, gc=False):
    """New tokens of one sequence, and perhaps its end."""

    id: int
    """``Request.id``."""
    token_ids: list[int]
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    """The stop token that ended it, if it was one of the request's own."""
    logprobs: list[TokenAlternatives] | None = None
    """One per token of ``token_ids``."""
    prompt_logprobs: list[TokenAlternatives] | None = None
    """The next positions of the prompt; they come in pieces as the prompt is computed."""
    num_cached_tokens: int | None = None
    """With the first token: how much of the prompt was found in the prefix cache."""
    error: str | None = None
    """Why the request failed; ``finish_reason`` is ``error`` then."""
    beams: list[Hypothesis] | None = None
    """The outcome of a beam search, best first; it comes once, at its end."""
