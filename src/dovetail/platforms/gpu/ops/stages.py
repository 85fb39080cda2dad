# mypy: disable-error-code="import-untyped"
"""What a row still needs while its token is chosen."""

from __future__ import annotations

import triton.language as tl

__all__ = ["BOUND", "DONE", "FEW", "FREE", "MANY"]

DONE = tl.constexpr(0)
"""Nothing: it has its token."""
FREE = tl.constexpr(1)
"""A draw from all that pass min_p; the mass of each chunk is known."""
FEW = tl.constexpr(2)
"""A draw from a list of its likeliest tokens."""
MANY = tl.constexpr(3)
"""A search: the list was not enough."""
BOUND = tl.constexpr(4)
"""A draw from all that reach its bound; the mass of each chunk is wanted."""
