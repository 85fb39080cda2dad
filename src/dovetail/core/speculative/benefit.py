"""Whether guessing pays: measured, by the number of sequences that decode together."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Benefit"]

_ENOUGH = 8
"""Steps of each kind before one is preferred."""
_REST = 160
"""Steps between two looks at the kind that is not preferred."""
_LOOK = 6
"""Steps of such a look."""
_FORGET = 0.05
"""Weight of the newest step."""


@dataclass
class _Rate:
    """Tokens and seconds of recent steps, older ones counting less; the first not at all."""

    steps: int = 0
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self.steps += 1
        if self.steps == 1:
            return
        keep = 1 - max(_FORGET, 1 / (self.steps - 1))
        self.tokens = keep * self.tokens + (1 - keep) * tokens
        self.seconds = keep * self.seconds + (1 - keep) * seconds

    @property
    def value(self) -> float:
        return self.tokens / self.seconds if self.seconds > 0 else 0.0


@dataclass
class _Level:
    """What is known for one order of magnitude of the batch."""

    rates: dict[bool, _Rate] = field(default_factory=lambda: {True: _Rate(), False: _Rate()})
    looking: int = 0
    """Steps that a look at the other kind still lasts."""
    resting: int = _REST


class Benefit:
    """Compares steps with drafts and steps without by the tokens per second that they gave.

    Batches of 1, 2 to 3, 4 to 7, ... sequences are judged apart, for drafts are nearly free while
    a step waits for memory and cost their full price once it computes. The kind that lost is
    tried again now and then.
    """

    def __init__(self) -> None:
        self._levels: dict[int, _Level] = {}

    def worthwhile(self, num_rows: int) -> bool:
        """Whether the next step of so many decoding sequences is to have drafts."""
        level = self._level(num_rows)
        for kind in (True, False):
            if level.rates[kind].steps < _ENOUGH:
                return kind
        better = level.rates[True].value >= level.rates[False].value
        return better != (level.looking > 0)

    def measured(self, num_rows: int, with_drafts: bool, tokens: int, seconds: float) -> None:
        """A step in which ``num_rows`` sequences decoded, and nothing else was computed."""
        level = self._level(num_rows)
        level.rates[with_drafts].add(tokens, seconds)
        if level.looking:
            level.looking -= 1
            return
        level.resting -= 1
        if level.resting <= 0:
            level.looking, level.resting = _LOOK, _REST

    def _level(self, num_rows: int) -> _Level:
        return self._levels.setdefault(num_rows.bit_length(), _Level())
