"""The grammars of an engine's sequences: ``Grammars`` over llguidance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING

import numpy as np

from dovetail.core.request import Request
from dovetail.core.structured.base import Accepted
from dovetail.core.structured.compiler import GrammarCompiler
from dovetail.core.structured.matcher import Matcher
from dovetail.core.types import IntArray

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from dovetail.core.structured.backend import Backend

__all__ = ["EngineGrammars"]


class EngineGrammars:
    """See ``Grammars``.

    Args:
        vocab_size: V, the width of the logits.
        backend: Called in a thread when the first grammar comes.
    """

    def __init__(self, vocab_size: int, backend: Callable[[], Backend]) -> None:
        self._vocab_size = vocab_size
        self._compiler = GrammarCompiler(backend)
        self._compiling: dict[int, Future[LLMatcher]] = {}
        self._matchers: dict[int, Matcher] = {}

    def __len__(self) -> int:
        """Sequences that are known."""
        return len(self._compiling) + len(self._matchers)

    def prepare(self, request: Request) -> bool:
        """See ``Grammars``."""
        if request.id in self._matchers:
            return True
        future = self._compiling.get(request.id)
        if future is None:
            future = self._compiling[request.id] = self._compiler.compile(request.grammar)
        if not future.done():
            return False
        del self._compiling[request.id]
        error = future.exception()
        start = None if error is not None else future.result()
        reason = None if error is None else f"structured output failed: {error}"
        self._matchers[request.id] = Matcher(start, request.emitted, reason)
        return True

    def wait(self, seconds: float) -> None:
        """See ``Grammars``."""
        self._compiler.wait(seconds)

    def masks(
        self,
        ids: Sequence[int],
        num_generated: Sequence[int],
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> IntArray:
        """See ``Grammars``."""
        each = drafts if drafts is not None else [()] * len(ids)
        matchers = [self._matchers[request_id] for request_id in ids]
        places = [0]
        for tokens in each:
            places.append(places[-1] + 1 + len(tokens))
        work = [
            (matcher.inner, place, list(tokens))
            for matcher, place, tokens in zip(matchers, places, each, strict=False)
            if matcher.inner is not None and matcher.error is None
        ]
        bits = self._filled(work, places[-1])
        for i, matcher in enumerate(matchers):
            matcher.check(num_generated[i])
            if matcher.error is not None:
                bits[places[i] : places[i + 1]] = -1
        return bits

    def _filled(self, work: list[tuple[LLMatcher, int, list[int]]], num_places: int) -> IntArray:
        """(G, ceil(V / 32)): what the backend writes, everything allowed elsewhere."""
        width = -(-self._vocab_size // 32)
        backend = self._compiler.backend
        if backend is None:
            return np.full((num_places, width), -1, np.int32)
        bits = np.full((num_places, -(-backend.tokenizer.vocab_size // 32)), -1, np.int32)
        backend.fill(work, bits)
        return bits if bits.shape[1] == width else bits[:, :width].copy()

    def valid_drafts(self, request_id: int, drafts: Sequence[int]) -> int:
        """See ``Grammars``."""
        return self._matchers[request_id].valid_drafts(drafts)

    def accept(self, request_id: int, token_ids: Sequence[int]) -> Accepted:
        """See ``Grammars``."""
        return self._matchers[request_id].accept(token_ids)

    def forget(self, request_id: int) -> None:
        """See ``Grammars``."""
        self._compiling.pop(request_id, None)
        self._matchers.pop(request_id, None)

    def close(self) -> None:
        """End the compiling thread."""
        self._compiler.close()
