"""A model on the platform, loaded as every engine is and driven step by step in this process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from dovetail.core.config.cache import fit_cache
from dovetail.core.config.checkpoint import read_facts
from dovetail.core.config.installed import resolve_installed
from dovetail.core.config.schema import EngineConfig
from dovetail.core.conformance.base import CheckFailedError, expect, expect_equal
from dovetail.core.conformance.oracle import Told, Wish
from dovetail.core.contracts.runner import CacheSpec, Runner
from dovetail.core.engine.build import scheduler_config
from dovetail.core.engine.core import EngineCore
from dovetail.core.errors import UnsupportedError
from dovetail.core.request import Request
from dovetail.core.scheduler.scheduler import Scheduler
from dovetail.core.structured.base import Accepted
from dovetail.core.types import IntArray
from dovetail.core.update import TokenAlternatives, Update

if TYPE_CHECKING:
    from dovetail.core.conformance.subject import Subject

__all__ = ["Answer", "Engine", "compare"]

_SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "max_num_seqs": 4,
    "max_num_batched_tokens": 48,
    "skip_tokenizer_init": True,
}
"""So small that few shapes are compiled, and prompts come in pieces and wait for each other."""
_MOST_STEPS = 10_000


@dataclass(kw_only=True)
class Answer:
    """Everything that came for one request."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenAlternatives] = field(default_factory=list)
    prompt_logprobs: list[TokenAlternatives] = field(default_factory=list)
    num_cached_tokens: int = 0

    def add(self, update: Update) -> None:
        """Take an update in. Raises CheckFailedError if the request has failed."""
        if update.error is not None:
            raise CheckFailedError(f"a request failed: {update.error}")
        self.token_ids += update.token_ids
        self.logprobs += update.logprobs or []
        self.prompt_logprobs += update.prompt_logprobs or []
        self.num_cached_tokens += update.num_cached_tokens or 0


class Engine(AbstractContextManager["Engine"]):
    """A loaded model, with the scheduler that every engine has.

    Args:
        subject: Whose platform it runs on.
        family: Of ``checkpoints.FAMILIES``.
        folder: Of another checkpoint of the family; None: the shelf's.
        before_allocate: Called with the loaded runner and the cost of its cache.
        wrap: What the scheduler is to take for the runner.
        settings: Fields of ``EngineConfig`` that are to differ from the kit's.
    """

    def __init__(
        self,
        subject: Subject,
        family: str,
        *,
        folder: Path | None = None,
        before_allocate: Callable[[Runner, CacheSpec], None] | None = None,
        wrap: Callable[[Runner], Runner] | None = None,
        **settings: Any,
    ) -> None:
        self.broken = False
        try:
            path = folder or subject.shelf.checkpoint(family)
            self._load(subject, path, settings, before_allocate)
        except UnsupportedError as error:
            # What may be lacking was asked before: this contradicts the capabilities.
            raise CheckFailedError(f"the platform refuses what it says it has: {error}") from error
        self._grammars = _Masks(self.resolved.vocab_size)
        self._next_id = 1
        limits = scheduler_config(self.resolved, self.num_blocks, self.spec.window)
        self.core = EngineCore(
            Scheduler(limits, self._grammars),
            self.runner if wrap is None else wrap(self.runner),
            steps_ahead=int(self.resolved.async_scheduling),
        )

    def _load(
        self,
        subject: Subject,
        folder: Path,
        settings: dict[str, Any],
        before_allocate: Callable[[Runner, CacheSpec], None] | None,
    ) -> None:
        """Decide the settings, read the weights, make the cache, warm up."""
        intent = EngineConfig.from_kwargs(model=str(folder), **(_SETTINGS | settings))
        resolved = resolve_installed(intent, read_facts(intent), subject.platform)
        self.runner = subject.platform.runner(resolved.runner_config())
        for _ in self.runner.load():
            pass
        self.spec = self.runner.cache_spec()
        plan = fit_cache(resolved, self.spec)
        self.resolved = resolved.with_cache(plan)
        self.num_blocks = plan.num_blocks
        if before_allocate is not None:
            before_allocate(self.runner, self.spec)
        self.runner.allocate(plan.num_blocks)
        for _ in self.runner.warm_up():
            pass

    def answer(self, wishes: Sequence[Wish], doomed: Sequence[Wish] = ()) -> list[Answer]:
        """Run all requests together to their end.

        Raises CheckFailedError if one of ``wishes`` fails, or one of ``doomed`` does not.
        """
        self.broken = True
        answers = {self.add(wish): Answer() for wish in wishes}
        alive = {self.add(wish) for wish in doomed}
        for _ in range(_MOST_STEPS):
            if not self.core.has_work():
                break
            for update in self.core.step():
                if update.id in answers:
                    answers[update.id].add(update)
                elif update.error is not None:
                    alive.discard(update.id)
        expect(not alive, "a request did not fail that has no numbers to go by")
        expect(not self.core.has_work(), f"requests are not finished after {_MOST_STEPS} steps")
        self.core.sweep()
        self.broken = False
        return list(answers.values())

    def add(self, wish: Wish) -> int:
        """Queue a request; returns its number."""
        number, self._next_id = self._next_id, self._next_id + 1
        if wish.mask is not None:
            self._grammars.add(number, wish)
        self.core.add(
            Request(
                id=number,
                prompt_token_ids=list(wish.prompt),
                params=wish.params,
                stop_token_ids=list(wish.stop_token_ids),
                seed=wish.seed,
                arrival_time=float(number),
                grammar="" if wish.mask is None else "conformance",
            )
        )
        return number

    def close(self) -> None:
        """Give everything back."""
        self.core.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def compare(wishes: Sequence[Wish], got: Sequence[Answer], want: Sequence[Told]) -> None:
    """Raise CheckFailedError unless every token is the oracle's."""
    for number, (wish, answer, told) in enumerate(zip(wishes, got, want, strict=True)):
        where = f"request {number} (a prompt of {len(wish.prompt)} tokens)"
        pairs = zip(answer.token_ids, told.token_ids, strict=False)
        wrong = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
        if wrong is not None:
            raise CheckFailedError(
                f"{where}: token {wrong} is {answer.token_ids[wrong]}, wanted"
                f" {told.token_ids[wrong]}; the oracle's two likeliest logits there are"
                f" {told.margins()[wrong]:.2g} apart"
            )
        expect_equal(f"{where}: number of tokens", len(answer.token_ids), len(told.token_ids))


class _Masks:
    """Grammars that allow the tokens which a wish names: see ``structured.base.Grammars``."""

    def __init__(self, vocab_size: int) -> None:
        self._width = -(-vocab_size // 32) * 32
        self._wishes: dict[int, Wish] = {}

    def add(self, number: int, wish: Wish) -> None:
        """A request with a mask."""
        self._wishes[number] = wish

    def prepare(self, request: Request) -> bool:
        """There is nothing to compile."""
        return True

    def wait(self, seconds: float) -> None:
        """Nothing is ever waited for."""

    def masks(
        self,
        ids: Sequence[int],
        num_generated: Sequence[int],
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> IntArray:
        """One row of bits for each place."""
        counts = [len(draft) for draft in drafts] if drafts is not None else [0] * len(ids)
        places = [
            self._bits(number, generated + extra)
            for number, generated, count in zip(ids, num_generated, counts, strict=True)
            for extra in range(count + 1)
        ]
        return np.stack(places)

    def _bits(self, number: int, generated: int) -> IntArray:
        mask = self._wishes[number].mask
        allowed: Collection[int] = mask(generated) if mask is not None else ()
        flags = np.zeros(self._width, np.uint8)
        flags[list(allowed)] = 1
        return np.packbits(flags, bitorder="little").view("<i4").astype(np.int32)

    def valid_drafts(self, request_id: int, drafts: Sequence[int]) -> int:
        """Drafts are left to the runner, which has to refuse what a mask does not allow."""
        return len(drafts)

    def accept(self, request_id: int, token_ids: Sequence[int]) -> Accepted:
        """No mask ever ends an answer."""
        return Accepted(len(token_ids), False)

    def forget(self, request_id: int) -> None:
        """The request has ended."""
        self._wishes.pop(request_id, None)
