"""The time between tokens as a line over the length of the context.

What a step does whatever the context (reading the weights, starting kernels) is the line's height
at 0; what grows with it (reading keys and values) is its slope. Two figures say which is slow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from dovetail.core.errors import ConfigError

__all__ = ["LatencyFit", "Point", "fit_line", "spread"]

_LONGEST = 8192
_PARTS = (1, 2, 4, 6, 8)
"""Eighths of the longest context that are measured."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """What was measured at one length."""

    context: float
    """Tokens before and with the one that is computed, in the mean."""
    milliseconds: float
    """Between two tokens of a request: the median."""
    bound: float | None = None
    """Milliseconds that the device needs at least, if its rates are known."""

    @property
    def fraction(self) -> float | None:
        """Of the roofline."""
        return None if self.bound is None else self.bound / self.milliseconds


@dataclass(frozen=True, kw_only=True)
class LatencyFit:
    """``milliseconds = base + slope x context / 1000``, by least squares."""

    batch_size: int
    base: float
    slope: float
    residual: float
    """Root of the mean square of what is left, in milliseconds."""
    points: tuple[Point, ...]

    def at(self, context: float) -> float:
        """Milliseconds that the line gives."""
        return self.base + self.slope * context / 1000

    def describe(self) -> str:
        """The line as people write it."""
        sign = "-" if self.slope < 0 else "+"
        return (
            f"ITL = {self.base:.3f} ms {sign} {abs(self.slope):.4f} ms x context / 1000"
            f"  (batch {self.batch_size}, residual {self.residual:.3f} ms)"
        )

    @property
    def fraction(self) -> float | None:
        """Of the roofline: the median over the points."""
        known = [point.fraction for point in self.points if point.fraction is not None]
        return median(known) if known else None


def fit_line(batch_size: int, points: Sequence[Point]) -> LatencyFit:
    """The line nearest to the points.

    Raises:
        ConfigError: They are not at two lengths at least.
    """
    if len({point.context for point in points}) < 2:
        raise ConfigError("a line needs the latency at two different context lengths at least")
    x = np.array([point.context for point in points]) / 1000
    y = np.array([point.milliseconds for point in points])
    slope, base = np.polyfit(x, y, 1)
    residual = float(np.sqrt(np.mean((y - base - slope * x) ** 2)))
    return LatencyFit(
        batch_size=batch_size,
        base=float(base),
        slope=float(slope),
        residual=residual,
        points=tuple(points),
    )


def spread(longest: int) -> list[int]:
    """Prompt lengths to measure at, up to a longest one and no further than 8192 tokens."""
    end = min(longest, _LONGEST)
    return sorted({max(1, end * part // _PARTS[-1]) for part in _PARTS})
