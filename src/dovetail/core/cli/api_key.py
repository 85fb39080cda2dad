"""The key with which commands address a server."""

from __future__ import annotations

import os

__all__ = ["key_header"]


def key_header(given: str | None) -> dict[str, str]:
    """The header that carries the key: the one that was given, else the environment's first."""
    key = given or os.environ.get("DOVETAIL_API_KEY", "").split(",")[0].strip()
    return {"Authorization": f"Bearer {key}"} if key else {}
