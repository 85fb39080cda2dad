"""How long a request may take: its own word, its header, or the server's setting."""

from __future__ import annotations

import math

from starlette.requests import Request

from dovetail.core.errors import RequestError
from dovetail.core.server.protocol import GenerationRequest
from dovetail.core.server.settings import ServerSettings

__all__ = ["HEADER", "timeout_of"]

HEADER = "x-request-timeout"
_MOST_S = 7 * 24 * 3600.0
"""A week: what is longer is a mistake, or no limit at all."""


def timeout_of(http: Request, request: GenerationRequest, settings: ServerSettings) -> float | None:
    """Seconds from arrival in which the answer must be complete; None: any number.

    Raises:
        RequestError: The field or the header is not a number above 0, or is above a week.
    """
    if request.timeout is not None:
        return _checked(request.timeout, "timeout", request.timeout)
    given = http.headers.get(HEADER)
    if given is None:
        return settings.request_timeout_s
    try:
        return _checked(float(given), HEADER, given)
    except ValueError as error:
        if isinstance(error, RequestError):
            raise
        return _checked(math.nan, HEADER, given)


def _checked(seconds: float, param: str, given: object) -> float:
    if not 0 < seconds <= _MOST_S:
        raise RequestError(
            f"{param} must be a number of seconds above 0 and at most {_MOST_S:.0f},"
            f" not {given!r:.80}.",
            param=param,
        )
    return seconds
