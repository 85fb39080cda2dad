"""What a user asks for, and what comes back, one request at a time."""

from __future__ import annotations

import math
from typing import Any

import msgspec

from dovetail.core.constraint import StructuredOutputsParams
from dovetail.core.errors import RequestError

__all__ = [
    "CompletionOutput",
    "FinishReason",
    "Logprob",
    "PromptTokens",
    "Request",
    "RequestOutput",
    "SamplingParams",
    "TokenLogprobs",
]

FinishReason = str
"""``stop`` (end-of-text token, stop token or stop string), ``length``, ``abort``, ``error``, or, of
``LLM`` alone, ``timeout``."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How the tokens of one request are chosen. Field names and meanings are vLLM's.

    Raises:
        RequestError: A value is of the wrong type or outside its range; names the field.
    """

    n: int = 1
    """Number of completions of the prompt."""
    best_of: int | None = None
    """Generate this many completions and give the ``n`` with the highest mean log-probability per
    token. With beam search: how many beams are followed. None: as many as ``n``."""
    use_beam_search: bool = False
    """Look for the likeliest texts instead of drawing one: ``n`` of them, best first."""
    length_penalty: float = 1.0
    """Beam search only: scores are the cumulative log-probability divided by the length to this
    power; larger values favour longer texts."""
    temperature: float = 1.0
    """0 takes the likeliest token (greedy); larger values flatten the distribution. Beam search
    ranks by it; 0 is as 1 there."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities sum to this, in (0, 1]."""
    top_k: int = 0
    """Keep the k likeliest tokens. 0 (or -1, as some clients send) keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this fraction of the likeliest one, in [0, 1]."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of each token that the output already holds, in [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtracted from the logit of a token for each time the output holds it, in [-2, 2]."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in prompt or output; > 0."""
    seed: int | None = None
    """With a seed, the same request gives the same tokens in any batch, on any row."""
    stop: list[str] | str | None = []
    """Generation ends when the text holds one of these. One string is a list of one."""
    stop_token_ids: list[int] | None = []
    """Generation ends when one of these tokens is chosen."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of the token that ended it, at the end of the text."""
    ignore_eos: bool = False
    """Go on after the end-of-text token."""
    max_tokens: int | None = 16
    """The most tokens to generate; None means up to the model's context."""
    min_tokens: int = 0
    """Tokens to generate before an end-of-text or stop token may be chosen."""
    logprobs: int | None = None
    """Log-probabilities of this many likeliest tokens (0: of the chosen token only; -1: of the
    whole vocabulary), up to the engine's ``max_logprobs``."""
    prompt_logprobs: int | None = None
    """The same, for each token of the prompt but the first."""
    logit_bias: dict[int, float] | None = {}
    """Added to the logits of these token ids, each in [-100, 100]."""
    allowed_token_ids: list[int] | None = []
    """If not empty, only these tokens may be chosen."""
    bad_words: list[str] | None = []
    """Texts that may not be generated. Each is tokenised with and without a space in front; its
    last token is forbidden where the tokens before it have just been generated."""
    bad_words_token_ids: list[list[int]] | None = []
    """The same, given as token ids."""
    logits_processors: dict[str, Any] | None = {}
    """Installed logits processors to apply, in this order: name to argument, which is plain data.
    ``dovetail.core.contracts.logits`` says what one is."""
    structured_outputs: StructuredOutputsParams | None = None
    """The form that the answer must have; a mapping with the same names serves too."""
    detokenize: bool = True
    """Turn tokens into text; without it, answers are token ids alone."""
    skip_special_tokens: bool = True
    """Leave special tokens, such as the end-of-text token, out of the text."""
    spaces_between_special_tokens: bool = True
    """If special tokens are shown: keep the spaces that some tokenizers put between them."""

    def __post_init__(self) -> None:
        self._normalise()
        for name, (kind, check, allowed) in _RULES.items():
            value = getattr(self, name)
            if kind is float and type(value) is int:
                value = float(value)
            if not _is_kind(value, kind) or not check(value):
                raise RequestError(f"{name} must be {allowed}, not {value!r:.80}.", param=name)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens ({self.min_tokens}) must not be greater than max_tokens"
                f" ({self.max_tokens}).",
                param="min_tokens",
            )
        if self.best_of is not None and self.best_of < self.n:
            raise RequestError(
                f"best_of ({self.best_of}) must not be smaller than n ({self.n}).", param="best_of"
            )
        self._check_beam_search()

    def _check_beam_search(self) -> None:
        """Refuse what has no meaning together: beams are not drawn, and not changed on the way."""
        if not self.use_beam_search:
            if self.length_penalty != 1.0:
                raise RequestError(
                    "length_penalty has a meaning only with use_beam_search.",
                    param="length_penalty",
                )
            return
        for field in msgspec.structs.fields(type(self)):
            value = getattr(self, field.name)
            if field.name not in _WITH_BEAMS and value not in (field.default, *_NOTHING):
                raise RequestError(
                    f"{field.name} cannot be combined with use_beam_search.", param=field.name
                )

    def _normalise(self) -> None:
        """Give the several spellings that clients use for one meaning a single form."""
        for name, nothing in _EMPTY.items():
            if getattr(self, name) is None:
                msgspec.structs.force_setattr(self, name, nothing())
        if isinstance(self.structured_outputs, dict):
            form = StructuredOutputsParams.of(self.structured_outputs)
            msgspec.structs.force_setattr(self, "structured_outputs", form)
        if isinstance(self.stop, str):
            msgspec.structs.force_setattr(self, "stop", [self.stop])
        if self.top_k == -1:
            msgspec.structs.force_setattr(self, "top_k", 0)

    @property
    def is_greedy(self) -> bool:
        """Whether nothing is drawn: the likeliest token is taken, or beams are followed."""
        return self.temperature < 1e-5 or self.use_beam_search

    @property
    def beam_temperature(self) -> float:
        """What divides the logits that beams are ranked by; 1 where nothing has to be divided."""
        return self.temperature if self.use_beam_search and self.temperature >= 1e-5 else 1.0

    @property
    def shapes_logits(self) -> bool:
        """Whether logits are changed by what this one request said or produced before."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1.0
            or self.logit_bias
            or self.allowed_token_ids
            or self.min_tokens
            or self.bad_words_token_ids
            or self.logits_processors
        )


_EMPTY: dict[str, type[list[Any]] | type[dict[Any, Any]]] = {
    "stop": list,
    "stop_token_ids": list,
    "allowed_token_ids": list,
    "bad_words": list,
    "bad_words_token_ids": list,
    "logit_bias": dict,
    "logits_processors": dict,
}
"""What null means in fields that hold several values."""

_NOTHING: tuple[Any, ...] = (None, [], {}, "")
"""Values that ask for nothing, whatever the default is."""

_WITH_BEAMS = frozenset(
    {
        "n",
        "best_of",
        "use_beam_search",
        "length_penalty",
        "temperature",
        "seed",
        "max_tokens",
        "ignore_eos",
        "stop_token_ids",
        "include_stop_str_in_output",
        "logprobs",
        "detokenize",
        "skip_special_tokens",
        "spaces_between_special_tokens",
    }
)
"""Fields that a beam search may set."""


def _is_kind(value: Any, kind: Any) -> bool:
    if kind is float:
        return type(value) is float and math.isfinite(value)
    if kind is int:
        return type(value) is int
    if kind == "int?":
        return value is None or type(value) is int
    return isinstance(value, kind)


def _within(low: float, high: float) -> Any:
    return lambda value: low <= value <= high


def _strings(value: list[Any]) -> bool:
    return len(value) <= 16 and all(isinstance(s, str) and 0 < len(s) <= 1024 for s in value)


def _ids(value: list[Any]) -> bool:
    return len(value) <= 1 << 18 and all(type(t) is int and 0 <= t < 1 << 31 for t in value)


def _bias(value: dict[Any, Any]) -> bool:
    return len(value) <= 1024 and all(
        type(t) is int and 0 <= t < 1 << 31 and isinstance(b, (int, float)) and abs(b) <= 100
        for t, b in value.items()
    )


def _words(value: list[Any]) -> bool:
    return len(value) <= 1024 and all(isinstance(w, str) and 0 < len(w) <= 100 for w in value)


def _token_words(value: list[Any]) -> bool:
    return len(value) <= 4096 and all(
        isinstance(w, list) and 0 < len(w) <= 512 and _ids(w) for w in value
    )


def _processors(value: dict[Any, Any]) -> bool:
    return len(value) <= 16 and all(isinstance(name, str) for name in value)


_COUNT = _within(0, 1 << 30)
_RULES: dict[str, tuple[Any, Any, str]] = {
    "n": (int, _within(1, 128), "an integer from 1 to 128"),
    "best_of": (
        "int?",
        lambda b: b is None or 1 <= b <= 128,
        "an integer from 1 to 128, not below n",
    ),
    "use_beam_search": (bool, lambda _: True, "true or false"),
    "length_penalty": (float, _within(-10, 10), "a number from -10 to 10"),
    "temperature": (float, _within(0, 100), "a number from 0 to 100"),
    "top_p": (float, lambda p: 0 < p <= 1, "a number greater than 0 and at most 1"),
    "top_k": (int, _within(-1, 1 << 30), "an integer from -1; 0 or -1 keeps all tokens"),
    "min_p": (float, _within(0, 1), "a number from 0 to 1"),
    "presence_penalty": (float, _within(-2, 2), "a number from -2 to 2"),
    "frequency_penalty": (float, _within(-2, 2), "a number from -2 to 2"),
    "repetition_penalty": (float, lambda p: 0 < p <= 100, "a number above 0 and at most 100"),
    "seed": ("int?", lambda s: s is None or -(1 << 63) <= s < 1 << 64, "a 64-bit integer"),
    "stop": (list, _strings, "at most 16 strings of 1 to 1024 characters"),
    "stop_token_ids": (list, _ids, "a list of token ids"),
    "max_tokens": ("int?", lambda m: m is None or 1 <= m < 1 << 30, "an integer of at least 1"),
    "min_tokens": (int, _COUNT, "an integer of at least 0"),
    "logprobs": (
        "int?",
        lambda k: k is None or -1 <= k < 1 << 30,
        "an integer from 0, or -1 for the whole vocabulary",
    ),
    "prompt_logprobs": (
        "int?",
        lambda k: k is None or -1 <= k < 1 << 30,
        "an integer from 0, or -1 for the whole vocabulary",
    ),
    "logit_bias": (dict, _bias, "at most 1024 token ids, each with a number from -100 to 100"),
    "allowed_token_ids": (list, _ids, "a list of token ids"),
    "bad_words": (list, _words, "at most 1024 strings of 1 to 100 characters"),
    "bad_words_token_ids": (
        list,
        _token_words,
        "at most 4096 lists of 1 to 512 token ids",
    ),
    "logits_processors": (dict, _processors, "at most 16 names, each with an argument"),
    "structured_outputs": (
        (StructuredOutputsParams, type(None)),
        lambda _: True,
        "a StructuredOutputsParams",
    ),
    "include_stop_str_in_output": (bool, lambda _: True, "true or false"),
    "ignore_eos": (bool, lambda _: True, "true or false"),
    "detokenize": (bool, lambda _: True, "true or false"),
    "skip_special_tokens": (bool, lambda _: True, "true or false"),
    "spaces_between_special_tokens": (bool, lambda _: True, "true or false"),
}


class Request(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One sequence for the engine, validated and complete. ``n`` completions are n of these."""

    id: int
    """Made by the front end, never by a client; unique for the life of the engine."""
    prompt_token_ids: list[int]
    """At least one token, each inside the vocabulary."""
    params: SamplingParams
    """``n`` is 1 here, except for a beam search; ``max_tokens`` is a number that fits the context,
    and bad words are token ids."""
    stop_token_ids: list[int]
    """The model's end-of-text tokens (unless ignored) and the request's own, without repeats."""
    seed: int
    """Where the sampling noise starts; drawn by the front end if the user gave none."""
    arrival_time: float
    """Seconds on the engine's clock."""
    priority: int = 0
    """Smaller goes first, under the ``priority`` policy."""
    cache_salt: str = ""
    """Requests share cached prefixes only with requests of the same salt."""
    parent: int | None = None
    """The id of the first completion of the same prompt, whose prefill this one shares."""
    emitted: list[int] = []
    """Tokens that were generated before, by an engine process that ended; they are kept."""
    grammar: str = ""
    """What ``params.structured_outputs`` asked for, examined and in llguidance's form."""


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """One candidate for a position."""

    logprob: float
    rank: int
    """1 for the likeliest token."""
    decoded_token: str | None = None


TokenLogprobs = dict[int, Logprob]
"""Candidates for one position by token id; the chosen token is always among them."""


class CompletionOutput(msgspec.Struct, kw_only=True):
    """One completion of a prompt, so far."""

    index: int
    text: str
    token_ids: list[int]
    cumulative_logprob: float | None = None
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it; None for the end-of-text token."""

    @property
    def finished(self) -> bool:
        """Whether it has ended."""
        return self.finish_reason is not None


class RequestOutput(msgspec.Struct, kw_only=True):
    """All completions of a prompt, so far."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    num_cached_tokens: int = 0
    """Tokens of the prompt that were found in the prefix cache."""


class PromptTokens(msgspec.Struct, frozen=True, kw_only=True):
    """A prompt after tokenisation: the text, if there was one, and the ids."""

    text: str | None
    token_ids: list[int]
