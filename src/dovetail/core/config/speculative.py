"""How tokens are guessed ahead: one mapping of the user's, checked and completed."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from dovetail.core.errors import ConfigError

__all__ = ["METHODS", "SpeculativeConfig"]

METHODS = ("ngram", "suffix", "draft_model")

_SYNONYMS = {
    "[ngram]": "ngram",
    "prompt_lookup": "ngram",
    "draft": "draft_model",
    "suffix_decoding_max_tree_depth": "longest_match",
    "suffix_decoding_max_spec_factor": "drafts_per_match",
    "suffix_decoding_min_token_prob": "min_token_prob",
    "prompt_lookup_max": "longest_match",
    "prompt_lookup_min": "shortest_match",
}
_BY_METHOD = {
    "ngram": {"shortest_match", "longest_match"},
    "suffix": {"longest_match", "drafts_per_match", "min_token_prob", "memory_tokens"},
    "draft_model": {"model"},
}
_DEFAULT_TOKENS = {"ngram": 5, "suffix": 16, "draft_model": 4}


@dataclasses.dataclass(frozen=True, kw_only=True)
class SpeculativeConfig:
    """How many tokens are guessed, and by what. Fields that a method does not use are ignored."""

    method: str
    """``ngram``, ``suffix`` or ``draft_model``."""
    num_speculative_tokens: int
    """The most tokens guessed per sequence and step."""
    model: str | None = None
    """Folder or hub name of the draft model."""
    adaptive: bool = True
    """Stop guessing, for batches of a size where it is measured to be slower."""
    shortest_match: int = 2
    """Tokens that must have occurred before, for ``ngram``."""
    longest_match: int = 24
    """Tokens that are compared at most."""
    drafts_per_match: float = 2.0
    """Most guesses per token that agrees, for ``suffix``."""
    min_token_prob: float = 0.25
    """Estimated probability below which ``suffix`` guesses no further."""
    memory_tokens: int = 200_000
    """Tokens of ended sequences that ``suffix`` keeps, for each cache salt."""

    @classmethod
    def parse(cls, given: Mapping[str, Any]) -> SpeculativeConfig | None:
        """The configuration that a mapping means; None if it is empty.

        Names of vLLM's ``speculative_config`` are understood.

        Raises:
            ConfigError: An entry is unknown, missing or of the wrong kind; names it.
        """
        if not given:
            return None
        fields: dict[str, Any] = {}
        for key, value in given.items():
            name = _SYNONYMS.get(key, key)
            if name in fields:
                raise ConfigError(f"speculative_config: {key} and another entry mean the same")
            fields[name] = value
        method = _method(fields)
        allowed = {"method", "num_speculative_tokens", "adaptive", *_BY_METHOD[method]}
        for name in fields:
            if name not in allowed:
                raise ConfigError(_unknown(name, method, allowed))
        fields.setdefault("num_speculative_tokens", _DEFAULT_TOKENS[method])
        if method == "ngram":
            fields.setdefault("longest_match", max(4, fields.get("shortest_match") or 0))
        return cls(**fields)

    def __post_init__(self) -> None:
        for name, (is_whole, low, high) in _RANGES.items():
            value = getattr(self, name)
            fits = isinstance(value, int if is_whole else (int, float))
            if not fits or isinstance(value, bool) or not low <= value <= high:
                wanted = "an integer" if is_whole else "a number"
                raise ConfigError(
                    f"speculative_config: {name} must be {wanted} from {low} to {high},"
                    f" not {value!r:.80}"
                )
        if type(self.adaptive) is not bool:
            raise ConfigError("speculative_config: adaptive must be true or false")
        if self.shortest_match > self.longest_match:
            raise ConfigError(
                f"speculative_config: shortest_match ({self.shortest_match}) must not exceed"
                f" longest_match ({self.longest_match})"
            )
        if self.method == "draft_model" and (not isinstance(self.model, str) or not self.model):
            raise ConfigError(
                "speculative_config: draft_model needs model, the folder or hub name of a smaller"
                " model with the same tokenizer"
            )


_RANGES: dict[str, tuple[bool, float, float]] = {
    "num_speculative_tokens": (True, 1, 32),
    "shortest_match": (True, 1, 64),
    "longest_match": (True, 1, 256),
    "drafts_per_match": (False, 0.1, 32),
    "min_token_prob": (False, 0, 1),
    "memory_tokens": (True, 0, 100_000_000),
}
"""Whether it is a whole number, and its least and greatest value."""


def _method(fields: dict[str, Any]) -> str:
    """Which method is meant: the one named, or ``draft_model`` where a model is."""
    method = fields.get("method")
    if method is None and fields.get("model") is not None:
        method = "draft_model"
    method = _SYNONYMS.get(str(method), str(method))
    if method not in METHODS:
        raise ConfigError(
            f"speculative_config: method must be one of {', '.join(METHODS)},"
            f" not {fields.get('method')!r:.80}"
        )
    fields["method"] = method
    if method != "draft_model" and fields.get("model") is None:
        fields.pop("model", None)
    return method


def _unknown(name: str, method: str, allowed: set[str]) -> str:
    close = difflib.get_close_matches(name, allowed, n=1, cutoff=0.6)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return (
        f"speculative_config: {name!r} means nothing to {method}{hint}"
        f" It takes {', '.join(sorted(allowed))}."
    )
