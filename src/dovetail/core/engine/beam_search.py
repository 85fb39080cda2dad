"""Beam search as ``LLM.beam_search`` takes and gives it; names and shapes are vLLM's."""

from __future__ import annotations

import msgspec

from dovetail.core.request import (
    CompletionOutput,
    FinishReason,
    RequestOutput,
    SamplingParams,
    TokenLogprobs,
)
from dovetail.core.tokenizer import Tokenizer

__all__ = ["BeamSearchOutput", "BeamSearchParams", "BeamSearchSequence", "beam_search_output"]


class BeamSearchParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to search; see ``core/scheduler/hypotheses.py`` for the rules."""

    beam_width: int
    """Beams that are followed, and sequences that are given."""
    max_tokens: int
    """The most tokens to generate."""
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    temperature: float = 0.0
    """Divides the logits before beams are ranked; 0 is as 1: the model's own probabilities."""
    length_penalty: float = 1.0
    """Scores are the cumulative log-probability divided by the length, prompt included, to this
    power."""
    include_stop_str_in_output: bool = False
    """Keep the end-of-text token at the end of a sequence."""

    def sampling_params(self) -> SamplingParams:
        """The same wish to an engine. Raises RequestError for values that are not allowed."""
        return SamplingParams(
            n=self.beam_width,
            use_beam_search=True,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
            temperature=self.temperature,
            length_penalty=self.length_penalty,
            include_stop_str_in_output=self.include_stop_str_in_output,
            logprobs=0,
        )


class BeamSearchSequence(msgspec.Struct, kw_only=True):
    """One of the likeliest texts."""

    tokens: list[int]
    """The prompt and what follows it."""
    logprobs: list[TokenLogprobs]
    """One entry per generated token, which holds that token."""
    cum_logprob: float
    """Of all that was generated, the end-of-text token included."""
    text: str | None = None
    """Of all tokens; None without a tokenizer."""
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None


class BeamSearchOutput(msgspec.Struct, kw_only=True):
    """The likeliest texts after one prompt, best first."""

    sequences: list[BeamSearchSequence]


def beam_search_output(output: RequestOutput, tokenizer: Tokenizer | None) -> BeamSearchOutput:
    """The outcome of a search in this form; without sequences if the request failed."""
    return BeamSearchOutput(
        sequences=[
            _sequence(output.prompt_token_ids, completion, tokenizer)
            for completion in output.outputs
            if completion.finish_reason != "error"
        ]
    )


def _sequence(
    prompt: list[int], completion: CompletionOutput, tokenizer: Tokenizer | None
) -> BeamSearchSequence:
    tokens = prompt + completion.token_ids
    return BeamSearchSequence(
        tokens=tokens,
        logprobs=completion.logprobs or [],
        cum_logprob=completion.cumulative_logprob or 0.0,
        text=None if tokenizer is None else tokenizer.decode(tokens, skip_special_tokens=False),
        finish_reason=completion.finish_reason,
        stop_reason=completion.stop_reason,
    )
