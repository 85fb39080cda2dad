"""One completion on its way out: tokens become text, up to a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from dovetail.core.engine.api import CompletionDelta
from dovetail.core.engine.stops import StopChecker
from dovetail.core.errors import RequestError
from dovetail.core.faults import fault
from dovetail.core.request import Logprob, PromptTokens, SamplingParams, TokenLogprobs
from dovetail.core.tokenizer import DecodeStream, Tokenizer
from dovetail.core.update import TokenAlternatives, Update

__all__ = ["CompletionStream", "LogprobNamer"]


class LogprobNamer(dict[int, str]):
    """Puts the engine's log-probabilities into the form of the API; keeps the text of tokens.

    Args:
        tokenizer: None leaves tokens without text.
    """

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        super().__init__()
        self._tokenizer = tokenizer

    def __missing__(self, token_id: int) -> str | None:
        if self._tokenizer is None:
            return None
        self[token_id] = text = self._tokenizer.token_text(token_id)
        return text

    def name(self, positions: Sequence[TokenAlternatives]) -> list[TokenLogprobs]:
        """One mapping per position, the chosen token first, then the likeliest."""
        return [self._name_one(position) for position in positions]

    def _name_one(self, position: TokenAlternatives) -> TokenLogprobs:
        ids, values = position.token_ids, position.logprobs
        named = {ids[0]: Logprob(values[0], position.rank, self[ids[0]])}
        for rank in range(1, len(ids)):
            token_id = ids[rank]
            if token_id not in named:
                named[token_id] = Logprob(values[rank], rank, self[token_id])
        return named


class _CloseSpecials:
    """A stream in which no space stands between special tokens that follow each other.

    Args:
        stream: Shows special tokens.
        specials: Their ids.
    """

    def __init__(self, stream: DecodeStream, specials: frozenset[int]) -> None:
        self._stream = stream
        self._specials = specials
        self._after_special = False

    def step(self, ids: Sequence[int]) -> str:
        """The text that ``ids`` complete."""
        return "".join([self._push(token_id) for token_id in ids])

    def flush(self) -> str:
        """What was held back."""
        return self._stream.flush()

    def _push(self, token_id: int) -> str:
        text = self._stream.step((token_id,))
        is_special = token_id in self._specials
        if is_special and self._after_special:
            text = text.lstrip(" ")
        self._after_special = is_special
        return text


class CompletionStream:
    """Turns the updates of one sequence into deltas of one completion.

    Args:
        index: Which of the ``n`` completions of its prompt it is.
        tokenizer: None if there is no text.
        namer: For log-probabilities.
        prompt: What the completion follows.
        params: What the client asked for.
        stop_token_ids: Tokens that end the sequence and whose text is left out.

    Raises:
        RequestError: Stop strings without text to look for them in.
    """

    __slots__ = ("_checker", "_min_tokens", "_namer", "_stop_ids", "_stream", "index", "token_ids")

    def __init__(
        self,
        index: int,
        tokenizer: Tokenizer | None,
        namer: LogprobNamer,
        prompt: PromptTokens,
        params: SamplingParams,
        stop_token_ids: frozenset[int],
    ) -> None:
        self.index = index
        self.token_ids: list[int] = []
        """All that the engine sent, for a new engine to go on from."""
        self._namer = namer
        self._min_tokens = params.min_tokens
        self._stop_ids = frozenset() if params.include_stop_str_in_output else stop_token_ids
        self._stream: DecodeStream | None = None
        self._checker: StopChecker | None = None
        if tokenizer is not None and params.detokenize:
            self._stream = tokenizer.new_stream(
                prompt.token_ids, skip_special_tokens=params.skip_special_tokens
            )
            if not (params.skip_special_tokens or params.spaces_between_special_tokens):
                self._stream = _CloseSpecials(self._stream, tokenizer.special_token_ids)
        if params.stop:
            if self._stream is None:
                raise RequestError(
                    "Stop strings need text to be found in: they cannot be combined with"
                    " detokenize=false or skip_tokenizer_init. Use stop_token_ids.",
                    param="stop",
                )
            self._checker = StopChecker(params.stop, params.include_stop_str_in_output)

    def push(self, update: Update) -> CompletionDelta:
        """What ``update`` adds. If it has a finish reason then the completion has ended."""
        fault("frontend.text", update.id)
        ids = update.token_ids
        self.token_ids += ids
        if self._stream is None:
            text = ""
        elif self._checker is not None:
            return self._push_checked(update, self._stream, self._checker)
        elif update.finish_reason is None:
            text = self._stream.step(ids)
        else:
            text = self._stream.step(self._shown(update)) + self._stream.flush()
        return self._delta(update, text)

    def _push_checked(
        self, update: Update, stream: DecodeStream, checker: StopChecker
    ) -> CompletionDelta:
        """As ``push``, one token at a time, so that the one that ends a stop string is known."""
        fault("frontend.stop", update.id)
        num_before = len(self.token_ids) - len(update.token_ids)
        pieces = []
        for i, token_id in enumerate(self._shown(update), 1):
            armed = num_before + i > self._min_tokens
            pieces.append(checker.feed(stream.step((token_id,)), armed=armed))
            if checker.matched is not None:
                return self._stopped(update, "".join(pieces), checker.matched, i)
        if update.finish_reason is not None:
            armed = len(self.token_ids) > self._min_tokens
            pieces.append(checker.feed(stream.flush(), armed=armed))
            if checker.matched is not None:
                num_tokens = len(update.token_ids)
                return self._stopped(update, "".join(pieces), checker.matched, num_tokens)
            pieces.append(checker.flush())
        return self._delta(update, "".join(pieces))

    def _shown(self, update: Update) -> list[int]:
        """The tokens that have text: not the one that stopped the sequence."""
        ids = update.token_ids
        if update.finish_reason == "stop" and ids and ids[-1] in self._stop_ids:
            return ids[:-1]
        return ids

    def _stopped(self, update: Update, text: str, stop: str, num_tokens: int) -> CompletionDelta:
        """The end of the completion, in the middle of what the engine sent."""
        return CompletionDelta(
            index=self.index,
            text=text,
            token_ids=update.token_ids[:num_tokens],
            logprobs=self._named(update, num_tokens),
            finish_reason="stop",
            stop_reason=stop,
        )

    def _delta(self, update: Update, text: str) -> CompletionDelta:
        return CompletionDelta(
            index=self.index,
            text=text,
            token_ids=update.token_ids,
            logprobs=self._named(update, len(update.token_ids)),
            finish_reason=update.finish_reason,
            stop_reason=update.stop_reason,
        )

    def _named(self, update: Update, num_tokens: int) -> list[TokenLogprobs] | None:
        """Log-probabilities of the first tokens; None if there are none."""
        if update.logprobs is None:
            return None
        fault("frontend.logprobs", update.id)
        return self._namer.name(update.logprobs[:num_tokens])
