"""What the scheduler asks of the grammars of its requests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from dovetail.core.errors import InvariantError
from dovetail.core.request import Request
from dovetail.core.types import IntArray

__all__ = ["Accepted", "Grammars", "NoGrammars"]


class Accepted(NamedTuple):
    """What became of the tokens that a sequence was given."""

    num_tokens: int
    """How many of them belong to the answer: those behind its end do not."""
    complete: bool
    """The answer is complete: nothing can follow."""
    error: str | None = None
    """Why the request has failed, if it has."""


class Grammars(Protocol):
    """The grammars of the sequences of one engine, by ``Request.id``. Belongs to one thread."""

    def prepare(self, request: Request) -> bool:
        """Whether a request with a grammar can run. Never waits; compiling begins when first asked.

        An impossible grammar is ready too: its request fails at its first token.
        """
        ...

    def wait(self, seconds: float) -> None:
        """Return when some grammar has become ready, or after ``seconds``."""
        ...

    def masks(
        self,
        ids: Sequence[int],
        num_generated: Sequence[int],
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> IntArray:
        """The tokens that may follow, as bits: see ``TokenMasks.bits``. No sequence moves on.

        Args:
            ids: M sequences that are ready.
            num_generated: Tokens that each has generated, all of them accepted.
            drafts: Per sequence, tokens that may come next. Each gets a place of its own behind
                the sequence's first: what may follow if the drafts so far are right. Behind a
                draft that the grammar refuses, all tokens are allowed.

        Returns:
            (G, ceil(V / 32)), one row per sequence and draft, in order.
        """
        ...

    def valid_drafts(self, request_id: int, drafts: Sequence[int]) -> int:
        """How many of these tokens the grammar lets follow, one after another, an end included."""
        ...

    def accept(self, request_id: int, token_ids: Sequence[int]) -> Accepted:
        """Tokens were emitted: go on behind them."""
        ...

    def forget(self, request_id: int) -> None:
        """The sequence has ended. Unknown ids are ignored."""
        ...


class NoGrammars:
    """For an engine that is given no request with a grammar: the front end refuses them."""

    def prepare(self, request: Request) -> bool:
        """See ``Grammars``."""
        raise InvariantError("engine", f"request {request.id} has a grammar, but there are none")

    def wait(self, seconds: float) -> None:
        """See ``Grammars``."""

    def masks(
        self,
        ids: Sequence[int],
        num_generated: Sequence[int],
        drafts: Sequence[Sequence[int]] | None = None,
    ) -> IntArray:
        """See ``Grammars``."""
        return np.zeros((0, 0), np.int32)

    def valid_drafts(self, request_id: int, drafts: Sequence[int]) -> int:
        """See ``Grammars``."""
        return len(drafts)

    def accept(self, request_id: int, token_ids: Sequence[int]) -> Accepted:
        """See ``Grammars``."""
        return Accepted(len(token_ids), False)

    def forget(self, request_id: int) -> None:
        """See ``Grammars``."""
