"""What guesses: from the tokens of a sequence so far, the ones that may come next."""

from __future__ import annotations

from typing import Protocol

from dovetail.core.types import IntArray

__all__ = ["Proposer"]


class Proposer(Protocol):
    """Proposes tokens on the host. A wrong guess costs time, never correctness."""

    def propose(self, row: int, epoch: int, salt: str, known: IntArray, count: int) -> list[int]:
        """At most ``count`` tokens that may follow.

        Args:
            row: Where the sequence runs: what is kept for it is kept under this number.
            epoch: Changes whenever the row is given to another sequence, or back to the same.
            salt: What is learnt from a sequence serves only sequences of the same salt.
            known: All tokens of the sequence so far, (L,). Not kept: the array is the caller's.
            count: At least 1.
        """
        ...
