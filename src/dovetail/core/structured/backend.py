"""llguidance, as far as it is used: grammars over one vocabulary.

Imported when the first grammar comes; nothing else in the engine process imports llguidance.
"""

from __future__ import annotations

import llguidance.numpy as llmasks
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

from dovetail.core.errors import RequestFailedError
from dovetail.core.machine import look_at_machine
from dovetail.core.structured.vocabulary import Encode, Vocabulary
from dovetail.core.types import IntArray

__all__ = ["Backend", "first_line", "new_matcher"]


class Backend:
    """Compiles grammars over a vocabulary, and works out masks.

    Args:
        vocabulary: All tokens.
        encode: The tokenizer's own way to write a text, which a model finds natural; where the
            grammar leaves no choice of text, this chooses among the ways to write it. None: the
            longest token each time.
    """

    def __init__(self, vocabulary: Vocabulary, encode: Encode | None = None) -> None:
        self.tokenizer = _trie(vocabulary, encode)
        self._executor: LLExecutor | None = None

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the start of a grammar in llguidance's form.

        Raises:
            RequestFailedError: There is no such grammar, or it is too large.
        """
        matcher = new_matcher(self.tokenizer, grammar)
        if matcher.is_error():
            raise RequestFailedError(f"it cannot be compiled: {first_line(matcher.get_error())}")
        return matcher

    def fill(self, work: list[tuple[LLMatcher, int, list[int]]], bits: IntArray) -> None:
        """Write what may follow each matcher, and each of its drafts, into the rows from its place.

        A matcher that fails at it says so by itself. Rows behind a draft that does not fit stay.
        """
        alone = [(matcher, place) for matcher, place, drafts in work if not drafts]
        drafting = [(matcher, place, drafts) for matcher, place, drafts in work if drafts]
        if self._executor is None:  # nobody else here computes while masks are worked out
            self._executor = LLExecutor(num_threads=look_at_machine().num_threads)
        if len(alone) == 1:
            llmasks.fill_next_token_bitmask(alone[0][0], bits, alone[0][1])
        elif alone:
            llmasks.fill_next_token_bitmask_par(self._executor, alone, bits)
        if drafting:
            llmasks.fill_next_token_bitmask_par_with_draft_tokens(self._executor, drafting, bits)


def new_matcher(tokenizer: LLTokenizer, grammar: str) -> LLMatcher:
    """A matcher at the start, perhaps in its error state.

    What a mask may cost is bounded: about 20 ms, then the matcher fails. llguidance's own bounds,
    four to five times as wide, let an ambiguous grammar hold up a step for 600 ms.
    """
    limits = LLParserLimits(
        max_items_in_row=500,
        step_lexer_fuel=100_000,
        step_max_items=10_000,
        max_lexer_states=50_000,
        verbose_errors=False,
    )
    return LLMatcher(tokenizer, grammar, log_level=0, limits=limits)


def first_line(error: str) -> str:
    """What is wrong; the lines that follow are llguidance's own state."""
    return error.strip().partition("\n")[0].partition("<state>")[0].strip()[:300]


def _trie(vocabulary: Vocabulary, encode: Encode | None) -> LLTokenizer:
    """The vocabulary as llguidance keeps it. Takes a second for a large one."""
    has_end = bool(vocabulary.ends)
    tokens = vocabulary.tokens if has_end else [*vocabulary.tokens, b"<end>"]
    special = vocabulary.special if has_end else [*vocabulary.special, len(tokens) - 1]
    ends = vocabulary.ends if has_end else [len(tokens) - 1]
    made: list[LLTokenizer] = []

    def write(text: bytes) -> list[int]:
        if encode is not None:
            ids = encode(text)
            if b"".join(tokens[i] for i in ids) == text:
                return ids
        # llguidance asks once while it is made, for the wrapper to find out what this takes.
        return made[0].greedy_tokenize(text.decode(errors="replace")) if made else []

    wrapper = TokenizerWrapper(_Description(tokens, special, ends[0], write))
    made.append(LLTokenizer(wrapper, n_vocab=len(tokens), eos_token=ends))
    return made[0]


class _Description:
    """What ``TokenizerWrapper`` wants to be given."""

    bos_token_id = None

    def __init__(
        self, tokens: list[bytes], special: list[int], eos_token_id: int, write: Encode
    ) -> None:
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos_token_id
        self._write = write

    def __call__(self, text: bytes) -> list[int]:
        return self._write(text)
