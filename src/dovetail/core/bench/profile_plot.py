"""A picture of a profile, as SVG: for each phase a bar of its classes, and below it, on the same
scale, what the device needs for each of them at least."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from dovetail.core.bench.profile import HOST, REST, ClassProfile, PhaseProfile
from dovetail.core.bench.profile_table import heading
from dovetail.core.bench.svg import COLOURS, document, text
from dovetail.core.contracts.platform import Rates

__all__ = ["profile_plot"]

_WIDTH, _LEFT = 760, 24
_BAR, _BOUND = 36, 16
"""Heights of the two bars."""
_LINE, _HEAD, _GAP = 20, 52, 34
_LABELLED = 64
"""A part of the bar that is so wide has its name in it."""
_PALETTE = (*COLOURS, "#be185d", "#0e7490", "#a16207", "#4d7c0f", "#6b21a8", "#9f1239")
_OTHERS = {REST: "#94a3b8", HOST: "#475569"}
_COLUMNS = (270, 370, 460, 590, 720)
"""Right ends of milliseconds, share, calls, what the device needs, and that over the first."""
_STYLE = " .inside { fill: #ffffff; font-size: 12px; } .head { fill: #64748b; font-size: 12px; }"


def profile_plot(title: str, profiles: Sequence[PhaseProfile], rates: Rates | None) -> str:
    """The picture's text.

    Args:
        title: What was measured, and on what.
        profiles: One for each phase.
        rates: Of the device; None: no bars of what it needs.
    """
    colours = _colours(profiles)
    parts = [text(_LEFT, 28, title, "start", "title")]
    y = _HEAD
    for profile in profiles:
        parts += _phase(profile, rates, colours, y)
        y += _height(profile, rates)
    return document(_WIDTH, y, title, _STYLE, parts)


def _colours(profiles: Sequence[PhaseProfile]) -> dict[str, str]:
    """A class has the same one in all phases."""
    names = {part.name: None for profile in profiles for part in profile.classes}
    ops = [name for name in names if name not in _OTHERS]
    return {name: _PALETTE[i % len(_PALETTE)] for i, name in enumerate(ops)} | _OTHERS


def _height(profile: PhaseProfile, rates: Rates | None) -> int:
    bound = 0 if rates is None else _BOUND + 4
    return 14 + _BAR + bound + _LINE * (len(profile.classes) + 1) + _GAP


def _phase(
    profile: PhaseProfile, rates: Rates | None, colours: dict[str, str], y: int
) -> Iterator[str]:
    bound = "" if rates is None else f"; below: the roofline, {_least(profile, rates)}"
    yield text(_LEFT, y, heading(profile) + bound, "start")
    y += 14
    measured = [(part, part.seconds) for part in profile.classes]
    scale = (_WIDTH - 2 * _LEFT) / max(_needed(profile, rates), profile.seconds)
    yield from _bar(measured, scale, colours, y, _BAR)
    y += _BAR
    if rates is not None:
        least = [(part, part.least.seconds(rates)) for part in profile.classes]
        yield from _bar(least, scale, colours, y + 4, _BOUND)
        y += _BOUND + 4
    y += _LINE
    bounded = ("", "") if rates is None else ("needs, ms", "of its time")
    yield from _row(y, "head", "", "ms", "share", "calls", *bounded)
    for part in profile.classes:
        y += _LINE
        yield f'<rect x="{_LEFT}" y="{y - 10}" width="11" height="11" fill="{colours[part.name]}"/>'
        yield from _row(y, "label", *_cells(part, profile, rates))


def _needed(profile: PhaseProfile, rates: Rates | None) -> float:
    """Seconds, one class after the other."""
    return 0.0 if rates is None else sum(part.least.seconds(rates) for part in profile.classes)


def _least(profile: PhaseProfile, rates: Rates) -> str:
    bound = profile.least.seconds(rates)
    return f"{bound * 1000:.2f} ms ({bound / profile.plain:.0%})"


def _bar(
    parts: Sequence[tuple[ClassProfile, float]],
    scale: float,
    colours: dict[str, str],
    y: float,
    height: int,
) -> Iterator[str]:
    widths = [max(0.0, seconds) * scale for _, seconds in parts]
    starts = accumulate(widths, initial=float(_LEFT))
    for (part, _), width, x in zip(parts, widths, starts, strict=False):
        if width:
            place = f'x="{x:.2f}" y="{y}" width="{width:.2f}" height="{height}"'
            yield f'<rect class="part" {place} fill="{colours[part.name]}"/>'
        if height == _BAR and width >= max(_LABELLED, 8 * len(part.name)):
            yield text(x + width / 2, y + height / 2 + 4, part.name, "middle", "inside")


def _row(y: float, name: str, label: str, *cells: str) -> Iterator[str]:
    if label:
        yield text(_LEFT + 18, y, label, "start", name)
    for x, cell in zip(_COLUMNS, cells, strict=True):
        if cell:
            yield text(x, y, cell, "end", name)


def _cells(part: ClassProfile, profile: PhaseProfile, rates: Rates | None) -> tuple[str, ...]:
    least = 0.0 if rates is None else part.least.seconds(rates)
    is_bounded = least > 0 and part.seconds > 0
    return (
        part.name,
        f"{part.seconds * 1000:.3f}",
        f"{part.seconds / profile.seconds:.1%}",
        f"{part.calls:g}" if part.calls else "",
        f"{least * 1000:.3f}" if is_bounded else "",
        f"{least / part.seconds:.1%}" if is_bounded else "",
    )
