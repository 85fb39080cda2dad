"""Two pages for browsers: a chat, and the API's description. Neither loads anything from afar."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response

__all__ = ["page"]

_FOLDER = Path(__file__).parent / "static"
_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
}


def page(name: str) -> Callable[[Request], Awaitable[Response]]:
    """A handler that serves the file ``name`` of the ``static`` folder."""
    return functools.partial(_serve, (_FOLDER / name).read_bytes())


async def _serve(content: bytes, http: Request) -> Response:
    return Response(content, media_type="text/html", headers=_HEADERS)
