"""What the pictures of measurements share."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

__all__ = ["COLOURS", "document", "text"]

COLOURS = ("#2563eb", "#c2410c", "#047857", "#7c3aed")
_STYLE = (
    'text { font: 13px -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: #0f172a; }'
    " .title { font-size: 15px; font-weight: 600; } .grid { stroke: #e2e8f0; }"
)


def document(width: int, height: int, title: str, style: str, parts: Iterable[str]) -> str:
    """A whole picture on white, with its title as its name."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *parts,
        "</svg>",
    ]
    return "\n".join(lines) + "\n"


def text(x: float, y: float, words: str, anchor: str, name: str = "label") -> str:
    """Words at a place; ``name`` is their class."""
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text class="{name}" {place}>{escape(words)}</text>'
