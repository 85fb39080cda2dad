"""A logits processor: code of a plug-in that changes what one request may or wants to say next."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

__all__ = ["LogitsProcessor"]


class LogitsProcessor(ABC):
    """One processor, offered as a class under the entry-point group ``dovetail.logits_processors``.

    One object is made per process and serves all requests that name it, so it keeps nothing of any
    of them: what it needs is handed over at each call. The front end makes one too, to ``validate``
    with: import what is heavy inside ``apply``.

    Its rows are not computed a step ahead, and ``apply`` runs while the device waits: be quick.
    """

    family: ClassVar[str] = "torch"
    """Whose arrays ``apply`` takes and gives: the platform's ``Capabilities.family`` must be it."""

    def validate(self, argument: Any, vocab_size: int) -> None:
        """Check the argument of a request when it arrives. Default: anything is fine.

        Args:
            argument: What the request gives, plain data as JSON has it.
            vocab_size: V.

        Raises:
            ValueError: Says in a sentence what is wrong; the request is refused with it.
        """
        return

    @abstractmethod
    def apply(self, logits_V: Any, output_token_ids: Sequence[int], argument: Any) -> Any:
        """Return the logits to choose the next token from.

        Args:
            logits_V: (V,) float32, after allowed tokens, biases, bad words and min_tokens, before
                penalties, temperature and the rest. May be changed in place. Tokens at minus
                infinity are forbidden already, and stay so whatever comes back.
            output_token_ids: What the request has generated so far. Not to be changed.
            argument: As it was validated.

        Returns:
            (V,) float32 on the same device: no NaN, no plus infinity, and something above minus
            infinity. Anything else, like an exception, ends this request alone with an error.
        """
        ...
