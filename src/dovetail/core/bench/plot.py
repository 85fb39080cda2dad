"""A picture of latency fits, as SVG: the points, the line, and the roofline below them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dovetail.core.bench.fit import LatencyFit
from dovetail.core.bench.svg import COLOURS, document, text

__all__ = ["latency_plot"]

_WIDTH, _HEIGHT = 720, 460
_LEFT, _RIGHT, _BOTTOM = 70, 32, 56
_LEGEND, _LINE = 46, 18
_STYLE = " .line { fill: none; stroke-width: 2; } .bound { fill: none; stroke-dasharray: 5 4; }"


@dataclass(frozen=True)
class _Frame:
    """From contexts and milliseconds, both from 0, to places in the picture."""

    most_x: float
    most_y: float
    top: float

    def x(self, context: float) -> float:
        return _LEFT + context / self.most_x * (_WIDTH - _LEFT - _RIGHT)

    def y(self, milliseconds: float) -> float:
        return _HEIGHT - _BOTTOM - milliseconds / self.most_y * (_HEIGHT - self.top - _BOTTOM)

    def path(self, pairs: Iterable[tuple[float, float]]) -> str:
        return "M" + " L".join(f"{self.x(a):.1f} {self.y(b):.1f}" for a, b in pairs)


def latency_plot(title: str, fits: Sequence[LatencyFit]) -> str:
    """The picture's text.

    Args:
        title: What was measured, and on what.
        fits: One for each batch size.
    """
    points = [point for fit in fits for point in fit.points]
    most_x = _ceiling(max(point.context for point in points))
    most_y = _ceiling(max(point.milliseconds for point in points))
    frame = _Frame(most_x, most_y, _LEGEND + _LINE * (len(fits) + 1))
    parts = [text(_LEFT, 24, title, "start", "title"), *_axes(frame)]
    for index, fit in enumerate(fits):
        parts += _fit(frame, fit, index)
    return document(_WIDTH, _HEIGHT, title, _STYLE, parts)


def _axes(frame: _Frame) -> Iterable[str]:
    for part in range(6):
        context, time = frame.most_x * part / 5, frame.most_y * part / 5
        across = ((0.0, time), (frame.most_x, time))
        yield f'<path class="grid" d="{frame.path(across)}"/>'
        yield text(frame.x(context), _HEIGHT - _BOTTOM + 20, f"{context:,.0f}", "middle")
        yield text(_LEFT - 8, frame.y(time) + 4, f"{time:g}", "end")
    yield text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, "context, tokens", "middle")
    yield text(_LEFT - 8, frame.top - 14, "ms per token", "middle")


def _fit(frame: _Frame, fit: LatencyFit, index: int) -> Iterable[str]:
    colour = COLOURS[index % len(COLOURS)]
    last = max(point.context for point in fit.points)
    ends = ((0.0, fit.at(0)), (last, fit.at(last)))
    yield f'<path class="line" stroke="{colour}" d="{frame.path(ends)}"/>'
    bounds = [(point.context, point.bound) for point in fit.points if point.bound is not None]
    if bounds:
        yield f'<path class="bound" stroke="{colour}" d="{frame.path(bounds)}"/>'
    for point in fit.points:
        x, y = frame.x(point.context), frame.y(point.milliseconds)
        yield f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
    label = fit.describe() + (", dashed: roofline" if bounds else "")
    y = _LEGEND + _LINE * index
    yield f'<rect x="{_LEFT}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
    yield text(_LEFT + 16, y, label, "start")


def _ceiling(value: float) -> float:
    """The next of 1, 1.5, 2, 3, 5 or 8 times a power of ten that is a little above the value."""
    step = 10.0 ** math.floor(math.log10(value * 1.05))
    return next(step * m for m in (1, 1.5, 2, 3, 5, 8, 10) if step * m >= value * 1.05)
