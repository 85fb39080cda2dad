"""A picture of how many times as fast this engine is as others, as SVG.

    python -m benchmarks.ratio_plot bf16=A/result.json int8=B/result.json --title TEXT > FILE.svg

draws results of ``benchmarks.cpu`` beside each other, which draws its own as ``result.svg``.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median

from dovetail.core.bench.svg import COLOURS, document, text

__all__ = ["Series", "ratio_plot"]

_WIDTH, _HEIGHT = 760, 380
_LEFT, _RIGHT, _TOP, _BOTTOM = 48, 16, 72, 44
_GAP = 0.3
"""Of a column's width, between it and the next."""
_MOST_MARKS = 6
_STYLE = (
    " .even { stroke: #0f172a; stroke-dasharray: 5 4; } .spread { stroke: #0f172a; }"
    " .value { font-size: 11px; }"
)
Series = Mapping[str, Sequence[float]]
"""By cell, the ratio in each round that has one."""


def ratio_plot(title: str, series: Mapping[str, Series]) -> str:
    """The picture's text: a column for each cell, in it a bar for each series.

    A bar ends at the median of the rounds; a line in it goes from the least to the most.

    Args:
        title: What was measured, and on what.
        series: By name; at least one has a ratio.
    """
    grid = list(dict.fromkeys(cell for each in series.values() for cell in each))
    most = max(ratio for each in series.values() for ratios in each.values() for ratio in ratios)
    marks = _marks(most)
    frame = _Frame(len(grid), len(series), marks[-1])
    parts = [text(_LEFT, 26, title, "start", "title"), *_legend(series), *_scale(frame, marks)]
    for column, cell in enumerate(grid):
        parts.append(text(frame.middle(column), _HEIGHT - _BOTTOM + 20, cell, "middle"))
        for number, each in enumerate(series.values()):
            if ratios := each.get(cell):
                parts += _bar(frame, column, number, ratios)
    place = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{frame.y(1):.1f}" y2="{frame.y(1):.1f}"'
    parts.append(f'<line class="even" {place}/>')
    return document(_WIDTH, _HEIGHT, title, _STYLE, parts)


class _Frame:
    """From columns, bars and ratios to places in the picture."""

    def __init__(self, num_columns: int, num_series: int, most: float) -> None:
        self._step = (_WIDTH - _LEFT - _RIGHT) / num_columns
        self._num_series = num_series
        self._most = most
        self.width = self._step * (1 - _GAP) / num_series

    def middle(self, column: int) -> float:
        return _LEFT + self._step * (column + 0.5)

    def x(self, column: int, number: int) -> float:
        return self.middle(column) + self.width * (number - self._num_series / 2)

    def y(self, ratio: float) -> float:
        return _HEIGHT - _BOTTOM - ratio / self._most * (_HEIGHT - _TOP - _BOTTOM)


def _marks(most: float) -> list[float]:
    """From 0 to above it and above even, in few and round steps."""
    least = max(most, 1.0) * 1.05
    size = 10.0 ** math.floor(math.log10(least))
    step = next(size * n for n in (0.25, 0.5, 1, 2) if least <= size * n * _MOST_MARKS)
    return [step * number for number in range(math.ceil(least / step) + 1)]


def _legend(series: Mapping[str, Series]) -> Iterator[str]:
    x = float(_LEFT)
    for number, name in enumerate(series):
        colour = COLOURS[number % len(COLOURS)]
        yield f'<rect x="{x:.1f}" y="40" width="10" height="10" fill="{colour}"/>'
        yield text(x + 16, 49, name, "start")
        x += 40 + 7.5 * len(name)


def _scale(frame: _Frame, marks: Sequence[float]) -> Iterator[str]:
    for ratio in marks:
        place = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{frame.y(ratio):.1f}"'
        yield f'<line class="grid" {place} y2="{frame.y(ratio):.1f}"/>'
        yield text(_LEFT - 8, frame.y(ratio) + 4, f"{ratio:,.4g}", "end")


def _bar(frame: _Frame, column: int, number: int, ratios: Sequence[float]) -> Iterator[str]:
    x, middle = frame.x(column, number), median(ratios)
    colour = COLOURS[number % len(COLOURS)]
    height = frame.y(0) - frame.y(middle)
    place = f'x="{x:.1f}" y="{frame.y(middle):.1f}" width="{frame.width - 2:.1f}"'
    yield f'<rect class="bar" {place} height="{height:.1f}" fill="{colour}"/>'
    centre = x + frame.width / 2 - 1
    if len(ratios) > 1:
        ends = f'y1="{frame.y(min(ratios)):.1f}" y2="{frame.y(max(ratios)):.1f}"'
        yield f'<line class="spread" x1="{centre:.1f}" x2="{centre:.1f}" {ends}/>'
    yield text(centre, frame.y(max(ratios)) - 5, f"{middle:.2f}", "middle", "value")


def _series(name: str, file: Path) -> dict[str, Series]:
    """Those of one result: one for each peer."""
    _, *peers = json.loads(file.read_text())["engines"]
    return {
        name if len(peers) == 1 else f"{name}, {peer['name']}": {
            cell["cell"]: cell["ratios"] for cell in peer["cells"] if cell["ratios"]
        }
        for peer in peers
    }


def main(arguments: Sequence[str] | None = None) -> int:
    about = __doc__.split("\n")[0]
    parser = argparse.ArgumentParser(prog="benchmarks.ratio_plot", description=about)
    parser.add_argument("results", nargs="+", metavar="NAME=result.json")
    parser.add_argument("--title", required=True)
    args = parser.parse_args(arguments)
    series: dict[str, Series] = {}
    for word in args.results:
        name, _, file = word.partition("=")
        try:
            series |= _series(name, Path(file))
        except (OSError, ValueError, KeyError, TypeError) as error:
            wanted = "NAME=FILE with a result of benchmarks.cpu"
            parser.error(f"{word!r} is not {wanted} ({type(error).__name__}: {error})")
    if not any(series.values()):
        parser.error("no engine is compared with another in what was given")
    sys.stdout.write(ratio_plot(args.title, series))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
