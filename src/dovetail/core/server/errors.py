"""Every refusal and failure as one answer: ``{"error": {message, type, param, code}}``."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import msgspec
from starlette.exceptions import HTTPException
from starlette.responses import Response

from dovetail.core.errors import (
    EngineDeadError,
    OverloadedError,
    RequestError,
    RequestFailedError,
    RequestTimeoutError,
    UnsupportedError,
)

__all__ = [
    "ClientGoneError",
    "ErrorBody",
    "ErrorEnvelope",
    "Failure",
    "HttpError",
    "error_event",
    "error_response",
    "log_failure",
    "to_failure",
]

MAX_MESSAGE = 1000
"""Characters of a message: what a client sent must not come back to it many times over."""
MAX_PARAM = 200
"""Characters of a parameter path."""

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_log = logging.getLogger("dovetail.server")


class HttpError(Exception):
    """A refusal that belongs to HTTP itself, such as 401, 413 or 415."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.headers = dict(headers or {})


class ClientGoneError(Exception):
    """The client closed the connection; there is nobody to answer. Logged as status 499."""


class ErrorBody(msgspec.Struct, frozen=True, kw_only=True):
    """What went wrong, in OpenAI's form."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorEnvelope(msgspec.Struct, frozen=True, kw_only=True):
    """The body of every answer whose status is 400 or above."""

    error: ErrorBody


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failure as a client sees it."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def envelope(self) -> ErrorEnvelope:
        """The JSON form, its parts bounded."""
        default = "server_error" if self.status >= 500 else "invalid_request_error"
        param = None if self.param is None else self.param[:MAX_PARAM]
        return ErrorEnvelope(
            error=ErrorBody(
                message=_bounded(self.message),
                type=_TYPES.get(self.status, default),
                param=param,
                code=self.code,
            )
        )


def to_failure(exc: BaseException, request_id: str = "") -> Failure:
    """What to tell the client about ``exc``. What is not the client's to know becomes an id."""
    match exc:
        case HttpError():
            return Failure(
                status=exc.status,
                message=str(exc),
                param=exc.param,
                code=exc.code,
                headers=exc.headers,
            )
        case RequestError():
            return Failure(
                status=exc.status, message=str(exc), param=_safe(exc.param), code=exc.code
            )
        case UnsupportedError():
            return Failure(status=400, message=str(exc), code="unsupported")
        case OverloadedError():
            return Failure(
                status=exc.status,
                message=str(exc),
                code="overloaded" if exc.status == 429 else "unavailable",
                headers={"retry-after": str(exc.retry_after)},
            )
        case RequestTimeoutError():
            return Failure(
                status=504, message=str(exc), code="timeout", headers={"x-should-retry": "false"}
            )
        case EngineDeadError():
            return Failure(
                status=503,
                message="The engine ended and could not be brought back; the server is stopping.",
                code="engine_dead",
                headers={"retry-after": "10", "connection": "close"},
            )
        case HTTPException():
            return _from_routing(exc)
    return _internal(exc, request_id)


def _from_routing(exc: HTTPException) -> Failure:
    """Starlette's own refusals: no such path, or no such method on it."""
    headers = dict(exc.headers or {})
    if exc.status_code == 404:
        message = "There is no such path on this server; GET /openapi.json lists what there is."
        return Failure(status=404, message=message, code="not_found", headers=headers)
    if exc.status_code == 405:
        allowed = headers.get("Allow", "another method")
        message = f"This path does not answer this method; it answers {allowed}."
        return Failure(status=405, message=message, code="method_not_allowed", headers=headers)
    return Failure(status=exc.status_code, message=exc.detail, headers=headers)


def _internal(exc: BaseException, request_id: str) -> Failure:
    where = f" Request id: {request_id}." if request_id else ""
    if isinstance(exc, RequestFailedError):
        message = "The engine could not finish this request; others are not affected."
        return Failure(status=500, message=message + where, code="request_failed")
    message = "The server met an error that it did not expect; its log has the details."
    return Failure(status=500, message=message + where, code="internal_error")


def log_failure(exc: BaseException, failure: Failure, request_id: str) -> None:
    """Write to the log what a 500 keeps from the client."""
    if failure.status == 500:
        known = isinstance(exc, RequestFailedError)
        _log.error("request %s failed: %s", request_id, exc, exc_info=None if known else exc)


def error_response(failure: Failure) -> Response:
    """The failure as a complete HTTP response."""
    return Response(
        msgspec.json.encode(failure.envelope()),
        status_code=failure.status,
        headers=dict(failure.headers),
        media_type="application/json",
    )


def error_event(failure: Failure) -> bytes:
    """The failure as an event in a stream that has already begun."""
    return b"data: " + msgspec.json.encode(failure.envelope()) + b"\n\n"


def _bounded(message: str) -> str:
    text = _safe(message) or ""
    return text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 3] + "..."


def _safe(text: str | None) -> str | None:
    """``text`` with what JSON cannot carry, lone surrogates, replaced."""
    return None if text is None else text.encode("utf-8", "replace").decode("utf-8")
