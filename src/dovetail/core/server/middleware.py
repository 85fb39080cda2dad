"""What happens around every request: an id, a line in the log, a count, one form of errors."""

from __future__ import annotations

import logging
import time

from starlette.datastructures import MutableHeaders
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dovetail.core.server.errors import (
    ClientGoneError,
    error_response,
    log_failure,
    to_failure,
)
from dovetail.core.server.metrics import ARRIVAL, Metrics
from dovetail.core.server.requestid import label_request

__all__ = ["NO_ROUTE", "RequestMiddleware"]

NO_ROUTE = "other"
"""The metric label of all paths that have no route."""
CLIENT_GONE = 499

_access = logging.getLogger("dovetail.server.access")


class RequestMiddleware:
    """The outermost layer: nothing gets past it but a failure after an answer has begun."""

    def __init__(self, app: ASGIApp, metrics: Metrics, access_log: bool) -> None:
        self._app = app
        self._metrics = metrics
        self._access_log = access_log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; there are no websockets."""
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        label, began, status = label_request(scope), time.perf_counter(), 0
        scope[ARRIVAL] = began

        async def labelled_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = label
            await send(message)

        try:
            await self._app(scope, receive, labelled_send)
        except ClientGoneError:
            status = CLIENT_GONE
        except Exception as exc:
            failure = to_failure(exc, label)
            log_failure(exc, failure, label)
            if status:
                raise
            await error_response(failure)(scope, receive, labelled_send)
        finally:
            self._record(scope, label, status or CLIENT_GONE, time.perf_counter() - began)

    def _record(self, scope: Scope, label: str, status: int, seconds: float) -> None:
        route = scope.get("route")
        handler = route.path if isinstance(route, Route) else NO_ROUTE
        self._metrics.count_http(handler, scope["method"], status, seconds)
        if self._access_log:
            _access.info(
                "%s %.200r %d %.1f ms id=%s",
                scope["method"],
                scope["path"],
                status,
                seconds * 1e3,
                label,
            )
