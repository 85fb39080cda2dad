"""The one place where requests are validated and made: for the server and for offline use."""

from __future__ import annotations

import random
import time
from collections.abc import Collection
from dataclasses import dataclass
from itertools import count

import msgspec

from dovetail.core.config.checkpoint import ModelFacts
from dovetail.core.config.schema import EngineConfig
from dovetail.core.engine.api import ModelInfo
from dovetail.core.errors import ContextLengthError, RequestError
from dovetail.core.faults import fault
from dovetail.core.kv.extent import blocks_for
from dovetail.core.plugins.logits import LogitsProcessors
from dovetail.core.request import PromptTokens, Request, SamplingParams
from dovetail.core.structured.examiner import Examiner
from dovetail.core.structured.vocabulary import read_vocabulary
from dovetail.core.tokenizer import Tokenizer, load_tokenizer

__all__ = ["CacheRoom", "Intake", "model_info", "num_logprobs", "read_tokenizer"]

_SEED_STEP = 0x9E3779B97F4A7C15
"""Apart the seeds of the completions of one prompt: an odd number, so that they all differ."""


def model_info(facts: ModelFacts, config: EngineConfig) -> ModelInfo:
    """The facts that clients may know."""
    limit = config.max_logprobs
    return ModelInfo(
        name=facts.name,
        path=str(facts.path),
        vocab_size=facts.vocab_size,
        max_model_len=facts.max_model_len,
        eos_token_ids=list(facts.eos_token_ids),
        default_params=facts.default_params,
        max_logprobs=facts.vocab_size if limit < 0 else min(limit, facts.vocab_size),
    )


def read_tokenizer(config: EngineConfig, facts: ModelFacts) -> Tokenizer | None:
    """The model's tokenizer; None if ``skip_tokenizer_init`` is set. Raises CheckpointError."""
    if config.skip_tokenizer_init:
        return None
    return load_tokenizer(
        facts.tokenizer_path,
        mode=config.tokenizer_mode,
        trust_remote_code=config.trust_remote_code,
    )


def num_logprobs(name: str, asked: int | None, info: ModelInfo) -> int | None:
    """How many alternatives per token a request means; -1 is the whole vocabulary.

    Raises:
        RequestError: More than the engine gives; names the field and the limit.
    """
    limit = info.max_logprobs
    if asked is None or 0 <= asked <= limit:
        return asked
    if asked == -1 and limit >= info.vocab_size:
        return info.vocab_size
    raise RequestError(
        f"{name} must be an integer from 0 to {limit}, not {asked!r:.40}: max_logprobs of the"
        " engine is the limit.",
        param=name,
    )


@dataclass(frozen=True, kw_only=True)
class CacheRoom:
    """The KV cache of the engine, for messages."""

    num_blocks: int
    block_size: int

    def lack(self, num_tokens: int) -> str:
        """What ``num_tokens`` need and there is, as a sentence; empty if they fit."""
        needed = blocks_for(num_tokens, self.block_size)
        if needed <= self.num_blocks:
            return ""
        return (
            f" They need {needed} KV cache blocks of {self.block_size} tokens, and there are"
            f" {self.num_blocks}."
        )


class Intake:
    """Turns a prompt and its parameters into one request per completion.

    Args:
        info: Facts about the model; read at each call, for the context may shrink at start-up.
        tokenizer: For ``bad_words`` and for answers of a given form; None refuses them.
        seed: Where seeds of requests without one come from; None draws from the system.
    """

    def __init__(
        self, info: ModelInfo, tokenizer: Tokenizer | None, *, seed: int | None = None
    ) -> None:
        self.info = info
        self.room: CacheRoom | None = None
        """The cache, once it is known."""
        self._tokenizer = tokenizer
        self._processors = LogitsProcessors()
        self._examiner: Examiner | None = None
        self._ids = count(1)
        self._random = random.Random(seed)

    def requests(
        self,
        prompt: PromptTokens,
        params: SamplingParams,
        *,
        priority: int = 0,
        cache_salt: str = "",
        cap_max_tokens: bool = False,
        grammar: str = "",
    ) -> list[Request]:
        """Validate, and make one request for each completion; they share their prefill.

        A beam search is one request, however many beams it has.

        Args:
            prompt: The prompt's tokens.
            params: How to sample.
            priority: Smaller goes first, under the ``priority`` policy.
            cache_salt: Whom to share cached prefixes with.
            cap_max_tokens: End at the model's context instead of refusing a larger
                ``max_tokens``.
            grammar: What ``grammar`` said of ``params``.

        Raises:
            ContextLengthError: Prompt and answer are longer than the context.
            RequestError: An empty prompt, a token id outside the vocabulary, more
                log-probabilities than are allowed, or a logits processor that is not there or
                refuses its argument.
            PluginError: A logits processor is broken.
        """
        self._check_tokens(prompt.token_ids, params)
        self._check_features(params)
        self._processors.check(params.logits_processors or {}, self.info.vocab_size)
        max_tokens = self._max_tokens(len(prompt.token_ids), params, cap_max_tokens)
        one = self._single(params, max_tokens)
        eos = [] if params.ignore_eos else self.info.eos_token_ids
        stop_ids = list(dict.fromkeys([*eos, *(params.stop_token_ids or [])]))
        seed = params.seed
        if seed is None:
            seed = self._random.getrandbits(63)
        count = 1 if params.use_beam_search else params.best_of or params.n
        first = next(self._ids)
        fault("frontend.intake", first)
        ids = [first, *(next(self._ids) for _ in range(count - 1))]
        return [
            Request(
                id=request_id,
                prompt_token_ids=prompt.token_ids,
                params=one,
                stop_token_ids=stop_ids,
                seed=(seed + index * _SEED_STEP) % (1 << 64),
                arrival_time=time.monotonic(),
                priority=priority,
                cache_salt=cache_salt,
                parent=first if index else None,
                grammar=grammar,
            )
            for index, request_id in enumerate(ids)
        ]

    def _single(self, params: SamplingParams, max_tokens: int) -> SamplingParams:
        """The parameters of one of the completions, as the engine needs them."""
        one = msgspec.structs.replace(
            params,
            max_tokens=max_tokens,
            stop=[],
            logprobs=num_logprobs("logprobs", params.logprobs, self.info),
            prompt_logprobs=num_logprobs("prompt_logprobs", params.prompt_logprobs, self.info),
            bad_words=[],
            bad_words_token_ids=self._bad_words(params),
            structured_outputs=None,
        )
        if params.use_beam_search:
            return one
        if params.best_of is not None and one.logprobs is None:
            one = msgspec.structs.replace(one, logprobs=0)
        return msgspec.structs.replace(one, n=1, best_of=None)

    def _bad_words(self, params: SamplingParams) -> list[list[int]]:
        """Those that were given as tokens, and both spellings of those that were given as text."""
        found = list(params.bad_words_token_ids or ())
        for word in params.bad_words or ():
            if self._tokenizer is None:
                raise RequestError(
                    "bad_words needs a tokenizer: with skip_tokenizer_init, give"
                    " bad_words_token_ids.",
                    param="bad_words",
                )
            for text in (word.lstrip(), f" {word.lstrip()}"):
                found.append(self._tokenizer.encode(text, add_special_tokens=False))
        unique = dict.fromkeys(tuple(ids) for ids in found if ids)
        return [list(ids) for ids in unique]

    def grammar(self, params: SamplingParams) -> str:
        """The form that the answer must have, examined; empty if it may have any. Waits.

        Raises:
            RequestError: The form is wrong or costs too much, or forms are not possible here.
            OverloadedError: Too many forms wait to be examined.
        """
        form = params.structured_outputs
        return "" if form is None else self._examine().grammar(form)

    async def admit(
        self, prompt: PromptTokens, params: SamplingParams, priority: int, cache_salt: str
    ) -> list[Request]:
        """As ``requests``, with the form of the answer examined beside the event loop."""
        form = params.structured_outputs
        grammar = "" if form is None else await self._examine().grammar_async(form)
        return self.requests(
            prompt, params, priority=priority, cache_salt=cache_salt, grammar=grammar
        )

    def settle(self, max_model_len: int, features: frozenset[str], room: CacheRoom) -> ModelInfo:
        """The engine is ready: what only it could say. Returns the facts with that in them."""
        self.room = room
        self.info = msgspec.structs.replace(
            self.info, max_model_len=max_model_len, features=features
        )
        return self.info

    def close(self) -> None:
        """End the processes that examine forms."""
        if self._examiner is not None:
            self._examiner.close()

    def _examine(self) -> Examiner:
        tokenizer, info = self._tokenizer, self.info
        if tokenizer is None or "structured_output" not in info.features:
            lacks = "a tokenizer" if tokenizer is None else "a platform that can mask tokens"
            raise RequestError(
                f"structured_outputs needs {lacks}, and this engine runs without.",
                param="structured_outputs",
                code="unsupported",
            )
        if self._examiner is None:
            self._examiner = Examiner(
                lambda: read_vocabulary(tokenizer, info.vocab_size, info.eos_token_ids)
            )
        return self._examiner

    def _check_features(self, params: SamplingParams) -> None:
        """Raise RequestError for what this engine's platform would not honour."""
        asked = {
            "bad_words": params.bad_words or params.bad_words_token_ids,
            "logits_processors": params.logits_processors,
            "prompt_logprobs": params.prompt_logprobs is not None,
        }
        for name, wanted in asked.items():
            if wanted and name not in self.info.features:
                raise RequestError(
                    f"{name} is not available on the platform that this engine runs on. Leave it"
                    " out.",
                    param=name,
                    code="unsupported",
                )

    def _check_tokens(self, token_ids: list[int], params: SamplingParams) -> None:
        if not token_ids:
            raise RequestError(
                "The prompt is empty: it must have at least one token.", param="prompt"
            )
        self._check_ids("prompt", token_ids)
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("logit_bias", params.logit_bias or ())
        for word in params.bad_words_token_ids or ():
            self._check_ids("bad_words_token_ids", word)

    def _check_ids(self, name: str, ids: Collection[int]) -> None:
        size = self.info.vocab_size
        if ids and (min(ids) < 0 or max(ids) >= size):
            wrong = next(t for t in ids if not 0 <= t < size)
            raise RequestError(
                f"{name} holds the token id {wrong}; this model's token ids go from 0 to"
                f" {size - 1}.",
                param=name,
            )

    def _max_tokens(self, num_prompt_tokens: int, params: SamplingParams, cap: bool) -> int:
        left = self.info.max_model_len - num_prompt_tokens
        wanted = left if params.max_tokens is None else params.max_tokens
        if left < 1 or (wanted > left and not cap):
            asked = "" if params.max_tokens is None else f" and {params.max_tokens} for the answer"
            total = num_prompt_tokens + (params.max_tokens or 1)
            lack = self.room.lack(total) if self.room is not None else ""
            raise ContextLengthError(
                f"This model's maximum context length is {self.info.max_model_len} tokens, but"
                f" the request has {num_prompt_tokens} tokens in the prompt{asked}.{lack} Shorten"
                " the prompt or lower max_tokens.",
                param="prompt" if left < 1 else "max_tokens",
            )
        return min(wanted, left)
