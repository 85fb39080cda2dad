"""A profile as people read it."""

from __future__ import annotations

from dovetail.core.bench.profile import ClassProfile, PhaseProfile
from dovetail.core.contracts.platform import Rates

__all__ = ["heading", "profile_table"]

_HEAD = ("class", "ms", "share", "calls", "MB", "GFLOP", "of reads", "of products")
_WIDTHS = (22, 9, 7, 7, 9, 9, 9, 12)


def heading(profile: PhaseProfile) -> str:
    """What was measured."""
    one = profile.batch_size == 1
    rows = "1 request" if one else f"{profile.batch_size} requests"
    each = "" if one else " each"
    what = f"{profile.phase}, {rows} of {profile.input_len} tokens{each}"
    if profile.phase == "decode" or profile.steps_each == 1:
        return f"{what}: {profile.plain * 1000:.2f} ms a step"
    return f"{what}: {profile.plain * 1000:.2f} ms in {profile.steps_each:g} steps"


def profile_table(profile: PhaseProfile, rates: Rates | None) -> str:
    """One line for each class, the sum, what timing costs, and the roofline if rates are known."""
    cost = profile.watched / profile.plain - 1
    lines = [
        heading(profile),
        _line(_HEAD),
        *(_line(_cells(part, profile, rates)) for part in profile.classes),
        _line(_total(profile)),
        f"Timing the ops costs {cost:+.1%}: {profile.watched * 1000:.2f} ms,"
        f" {profile.plain * 1000:.2f} ms without (medians of {profile.num_measured}).",
    ]
    if rates is not None:
        bound = profile.least.seconds(rates)
        lines.append(
            f"Roofline {bound * 1000:.2f} ms, {bound / profile.plain:.1%} of the time: the device"
            f" reads {rates.read_bytes_per_second / 1e9:,.1f} GB/s and computes"
            f" {rates.matrix_flops_per_second / 1e12:,.2f} TFLOP/s, measured just now."
        )
    return "\n".join(lines)


def _cells(part: ClassProfile, profile: PhaseProfile, rates: Rates | None) -> tuple[str, ...]:
    return (
        part.name,
        f"{part.seconds * 1000:.3f}",
        f"{part.seconds / profile.seconds:.1%}",
        f"{part.calls:g}" if part.calls else "",
        _amount(part.num_bytes / 1e6),
        _amount(part.least.flops / 1e9),
        _percent(None if rates is None else part.read_fraction(rates)),
        _percent(None if rates is None else part.matrix_fraction(rates)),
    )


def _total(profile: PhaseProfile) -> tuple[str, ...]:
    parts = profile.classes
    return (
        "sum",
        f"{profile.seconds * 1000:.3f}",
        "100.0%",
        f"{sum(part.calls for part in parts):g}",
        _amount(sum(part.num_bytes for part in parts) / 1e6),
        _amount(profile.least.flops / 1e9),
        "",
        "",
    )


def _amount(value: float) -> str:
    return f"{value:.3f}" if value else ""


def _percent(fraction: float | None) -> str:
    return "" if fraction is None else f"{fraction:.1%}"


def _line(cells: tuple[str, ...]) -> str:
    first, *others = cells
    widths = _WIDTHS[1:]
    right = (cell.rjust(width) for cell, width in zip(others, widths, strict=True))
    return (first.ljust(_WIDTHS[0]) + "".join(right)).rstrip()
